"""How tests of wrong inputs ask: `main` in process, one line on stderr, exit code 2."""

from __future__ import annotations

import pytest

from opo_megatron.cli.main import main

SECTIONS = ("policy.", "rollout.", "observe.", "task.", "algorithm.", "on_policy.")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 600
    return error


def split(overrides: str) -> list[str]:
    """Overrides are apart by a space before the next key; values keep theirs."""
    parts: list[str] = []
    for piece in overrides.split(" ") if overrides else []:
        if parts and not piece.startswith(SECTIONS):
            parts[-1] += " " + piece
        else:
            parts.append(piece)
    return parts
