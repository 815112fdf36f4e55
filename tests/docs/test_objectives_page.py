"""docs/objectives.md has the table of objectives."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_objectives import TARGET, main

from opo_megatron.algorithm.objectives.table import SPECS


def test_the_committed_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "objectives.md"
    stale.write_text(
        TARGET.read_text(encoding="utf-8").replace("| `kimi` | `tau` | 0.1", "| `kimi` | `tau` | 0.2")
    )
    monkeypatch.setattr("make_objectives.TARGET", stale)
    assert main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err


def test_every_objective_has_a_row_and_every_option_one() -> None:
    page = TARGET.read_text(encoding="utf-8")
    for name, spec in SPECS.items():
        assert spec.formula.replace("|", "\\|") in page, name
        for option in spec.options:
            assert f"| `{name.value}` | `{option}` |" in page, (name, option)
