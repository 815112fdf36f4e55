"""A run that is struck at any moment and started again by the same command is the run that never was.

Moments are watched from inside (struck_run.py), never by the clock.
"""

from __future__ import annotations

from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1

import pytest

from opo_megatron.errors import EXIT_PREEMPTED
from tests.support.interrupted import COMMAND, STEPS, assert_same_run, attempts, curves
from tests.support.tiny_run import rows
from tests.support.workers.interrupted_run import MOMENTS


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Started once, struck by nothing."""
    run_dir = tmp_path_factory.mktemp("runs") / "calm"
    assert attempts(run_dir) == [0]
    assert [row["step"] for row in rows(run_dir)] == list(range(STEPS + 1))
    assert [step for step, _ in curves(run_dir)["tensorboard/reward/mean"]] == list(range(1, STEPS + 1))
    return run_dir


def test_a_run_killed_in_every_phase_equals_an_uninterrupted_one(calm: Path, tmp_path: Path) -> None:
    schedules = [[moment, int(SIGKILL)] for moment in MOMENTS]
    assert attempts(tmp_path / "run", *schedules) == [-SIGKILL] * len(schedules) + [0]
    assert_same_run(tmp_path / "run", calm)
    assert rows(tmp_path / "run")[-1]["run/attempt"] == len(schedules) + 1


def test_a_run_stopped_in_every_phase_equals_an_uninterrupted_one(calm: Path, tmp_path: Path) -> None:
    schedules = [
        ["saving", int(SIGTERM)],
        ["warm start", int(SIGTERM)],
        ["evaluation", int(SIGTERM)],
        ["generation", int(SIGUSR1)],
        ["training", int(SIGUSR1)],
    ]
    codes = attempts(tmp_path / "run", *schedules)
    assert codes == [EXIT_PREEMPTED] * len(schedules) + [0]
    assert_same_run(tmp_path / "run", calm)


@pytest.mark.slow
def test_minutes_that_are_over_end_the_run_like_a_signal(tmp_path: Path) -> None:
    """Each attempt has time for one step and no more."""
    command = (*COMMAND, "run.max_minutes=1e-9", "warm_start.steps=1", "train.steps=2")
    codes = attempts(tmp_path / "run", None, command=command)
    assert codes == [EXIT_PREEMPTED] * 2
    assert [row["run/attempt"] for row in rows(tmp_path / "run", "warm_start.jsonl")] == [1]
    assert [row["run/attempt"] for row in rows(tmp_path / "run")] == [2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_quickstart_of_30_steps_is_the_same_with_and_without_five_kills(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    command = ("resume=auto", "train.steps=30", "eval.every_steps=10", "eval.problems=256")
    command = (*command, "checkpoint.every_steps=10")
    assert attempts(calm, command=command, reward=("--real",)) == [0]
    schedules = [[moment, int(SIGKILL)] for moment in MOMENTS]
    codes = attempts(killed, *schedules, command=command, reward=("--real",))
    assert codes == [-SIGKILL] * len(schedules) + [0]
    assert_same_run(killed, calm)
