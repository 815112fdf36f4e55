"""A resumed run reads what the run has read: the same rows in the same order, and the same verifier."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.tiny_run import train

VERIFIER = "def reward(prompt, response, answer):\n    return len(response) % 7 / 7\n"
ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a verifier, and a run of two steps."""
    folder = tmp_path_factory.mktemp("inputs")
    write(folder / "data.jsonl", ROWS)
    (folder / "graded.py").write_text(VERIFIER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        assert train(folder / "run", *settings(folder), "train.steps=2") == 0
    return folder


def settings(folder: Path, data: str = "data.jsonl") -> list[str]:
    text = "task.name=text task.verifier=graded:reward task.max_prompt_tokens=20 warm_start.steps=0"
    return [f"task.data={folder / data}", *text.split(), "optimizer.schedule=constant", "eval.every_steps=0"]


@pytest.fixture
def resume(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Resumes a copy of the run, with a copy of its inputs that a test may have changed."""
    shutil.copytree(first, tmp_path / "copy")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'copy'}:{ROOT}")

    def run(*options: str, data: str = "data.jsonl") -> int:
        folder = tmp_path / "copy"
        return train(folder / "run", *settings(folder, data), "train.steps=3", "resume=auto", *options)

    return run


def add(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [*rows, {"question": "9+9=", "answer": "18"}]


def edit(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**rows[0], "answer": "1"}, *rows[1:]]


def swap(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [rows[1], rows[0], *rows[2:]]


@pytest.mark.parametrize("change", [add, edit, swap])
def test_other_rows_are_refused_by_name(
    resume: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable
) -> None:
    path = tmp_path / "copy" / "data.jsonl"
    write(path, change(ROWS))
    assert resume() == 2
    error = capsys.readouterr().err
    assert f"the rows of task.data={path} changed since the checkpoint" in error and error.count("\n") == 1
    assert "add --allow task.data to change the curve on purpose" in error


def test_the_same_rows_may_be_elsewhere(resume: Callable[..., int], tmp_path: Path) -> None:
    shutil.move(tmp_path / "copy" / "data.jsonl", tmp_path / "copy" / "moved.jsonl")
    assert resume(data="moved.jsonl") == 0


def test_another_verifier_of_the_same_name_is_refused_by_name(
    resume: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "copy" / "graded.py").write_text(VERIFIER.replace("7", "5"))
    assert resume() == 2
    assert "the source of task.verifier=graded:reward changed since" in capsys.readouterr().err
    assert resume("--allow", "task.verifier") == 0
