"""Helpers for tests of wrong inputs: `main` in process, one line on stderr, exit code 2."""

from __future__ import annotations

import pytest

from opo_megatron.cli.main import main

SECTIONS = ("policy.", "rollout.", "observe.", "task.", "algorithm.", "on_policy.")


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one error line of a command that exits with code 2."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 600
    return error


def split(overrides: str) -> list[str]:
    """Splits overrides at a space before the next key; spaces in values stay."""
    parts: list[str] = []
    for piece in overrides.split(" ") if overrides else []:
        if parts and not piece.startswith(SECTIONS):
            parts[-1] += " " + piece
        else:
            parts.append(piece)
    return parts
