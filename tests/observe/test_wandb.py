"""Weights & Biases, offline with the real package: its own reader shows the rows of metrics.jsonl."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from tests.support.fixtures import RECIPE, SMALL_MODEL
from tests.support.requirements import require

TINY = (
    *SMALL_MODEL,
    "warm_start.steps=2",
    "train.steps=2",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=2",
    "eval.every_steps=2",
    "eval.problems=4",
    "checkpoint.every_steps=1",
    "observe.kl=off",
)
WANDB_COLUMNS = ("_runtime", "_step", "_timestamp")
"""Columns that W&B adds to a row."""


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The package, without the user's settings and credentials."""
    package = require("wandb", "make setup-dev")
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    package.teardown()
    yield package
    package.teardown()


def train(run_dir: Path, *overrides: str) -> int:
    return main(["train", str(RECIPE), f"run.dir={run_dir}", *TINY, *overrides])


def rows(run_dir: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def read_back(run_dir: Path) -> list[list[dict]]:
    """The records of each attempt, oldest first, as `wandb leet inspect` prints them."""
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    outputs = [
        subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60, check=True).stdout
        for path in files
    ]
    return [[json.loads(line) for line in text.splitlines()] for text in outputs]


def of_type(records: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.slow
def test_wandb_has_two_axes_and_a_resumed_run_continues(
    wandb: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = tmp_path / "run"
    assert train(run_dir, "observe.wandb_project=lift") == 0
    assert train(run_dir, "observe.wandb_project=lift", "resume=auto", "train.steps=3") == 0

    attempts = read_back(run_dir)
    runs = [of_type(records, "run")[0] for records in attempts]
    assert [run["project"] for run in runs] == ["lift", "lift"]
    assert {run["run_id"] for run in runs} == {(run_dir / "wandb_run_id").read_text().strip()}
    assert all(run["resume"] for run in runs)
    assert runs[1]["config"]["update"]["train"]["steps"] == 3
    assert runs[1]["config"]["update"]["policy"]["dtype"] == load_config(RECIPE).policy.dtype.value

    logged = [row["item"] for records in attempts for row in of_type(records, "history")]
    logged = [{name: value for name, value in row.items() if name not in WANDB_COLUMNS} for row in logged]
    warm = [
        {"warm_start/" + name: value for name, value in row.items()}
        for row in rows(run_dir, "warm_start.jsonl")
    ]
    expected_rows = [*warm, *rows(run_dir, "metrics.jsonl")]
    assert len(logged) == len(expected_rows) == 2 + 4
    for actual, row in zip(logged, expected_rows, strict=True):
        expected = {name: value for name, value in row.items() if not name.endswith("run/attempt")}
        assert actual == pytest.approx(expected)

    axes = {metric["name"]: metric.get("step_metric") for r in attempts for metric in of_type(r, "metric")}
    for name in {name for row in logged for name in row} - {"step", "warm_start/step"}:
        assert axes[name] == ("warm_start/step" if name.startswith("warm_start/") else "step"), name
    assert [end["exit_code"] for end in of_type(attempts[0], "exit")] == [0]


def test_a_run_that_fails_is_marked_failed(
    wandb: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    overrides = ("observe.wandb_project=lift", "warm_start.lr=1e36")
    assert train(tmp_path / "run", *overrides) == 2
    assert not (tmp_path / "run" / "wandb").exists(), "WANDB_DIR sets the folder of its files"
    (records,) = read_back(tmp_path)
    assert [end["exit_code"] for end in of_type(records, "exit")] == [1]


@pytest.mark.parametrize("key", [None, "short"])
def test_a_missing_login_is_one_sentence_and_no_prompt(
    wandb: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    key: str | None,
) -> None:
    # As in a terminal, where W&B would prompt for a key and wait.
    monkeypatch.setattr("wandb.errors.term.can_use_terminput", lambda: True)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert train(tmp_path / "run", "observe.wandb_project=lift") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: observe.wandb_project=lift") and error.count("\n") == 1
    assert "WANDB_MODE=offline" in error and ("40+ characters" if key else "no API key") in error
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_one_sentence_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(tmp_path / "run", "observe.wandb_project=lift") == 2
    error = capsys.readouterr().err
    assert "pip install 'opo-megatron[wandb]'" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_wandb_is_not_imported_when_it_is_off(tmp_path: Path) -> None:
    code = (
        "import sys; from opo_megatron.cli.main import main; code = main(sys.argv[1:]); "
        "print(code, 'wandb' in sys.modules, 'torch' in sys.modules)"
    )
    arguments = ["train", str(RECIPE), f"run.dir={tmp_path / 'run'}", *TINY, "train.steps=0"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.splitlines()[-1] == "0 False True"
