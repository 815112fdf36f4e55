"""metrics.jsonl: complete rows in order, a partial last line ignored, and strict JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from opo_megatron.observe.metrics_file import MetricsFile


@pytest.fixture
def rows(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def fill(rows: MetricsFile, steps: int) -> None:
    for step in range(steps):
        rows.append({"step": step, "loss": step / 3, "name": "Füße\n\u2028"})


def test_rows_are_read_back_as_they_were_appended(rows: MetricsFile) -> None:
    assert rows.read() == []
    fill(rows, 4)
    assert rows.read() == [{"step": s, "loss": s / 3, "name": "Füße\n\u2028"} for s in range(4)]
    assert MetricsFile(rows.path).read() == rows.read()
    assert len(rows.path.read_text().splitlines()) == 4


@pytest.mark.parametrize("partial", ['{"step": 4, "lo', '{"step": 4}', "{", "\x00\x00"])
def test_a_partial_last_line_is_not_a_row(rows: MetricsFile, partial: str) -> None:
    """A line without a newline is partial, even where it happens to be valid JSON."""
    fill(rows, 4)
    with rows.path.open("a") as file:
        file.write(partial)
    assert [row["step"] for row in rows.read()] == [0, 1, 2, 3]
    rows.truncate_after(3)
    rows.append({"step": 4})
    assert [row["step"] for row in rows.read()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("step", "kept"), [(-1, []), (0, [0]), (2, [0, 1, 2]), (99, [0, 1, 2, 3])])
def test_truncating_drops_later_rows_and_keeps_the_rest_bytewise(
    rows: MetricsFile, step: int, kept: list[int]
) -> None:
    fill(rows, 4)
    before = rows.path.read_bytes().splitlines(keepends=True)
    rows.truncate_after(step)
    assert [row["step"] for row in rows.read()] == kept
    assert rows.path.read_bytes() == b"".join(before[: len(kept)])
    assert [file.name for file in rows.path.parent.iterdir()] == [rows.path.name]


def test_truncating_a_missing_file_leaves_no_rows(rows: MetricsFile) -> None:
    rows.truncate_after(5)
    assert rows.read() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_written_as_null(rows: MetricsFile, value: float) -> None:
    rows.append({"step": 1, "loss": value, "fine": 0.1})

    def reject(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = rows.path.read_text()
    assert json.loads(line, parse_constant=reject) == {"step": 1, "loss": None, "fine": 0.1}
