"""A run interrupted at any moment and restarted by the same command equals an uninterrupted run.

The worker (interrupted_run.py) detects the moments itself; nothing depends on the clock.
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
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is not interrupted."""
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert attempts(run_dir) == [0]
    assert [row["step"] for row in rows(run_dir)] == list(range(STEPS + 1))
    assert [step for step, _ in curves(run_dir)["tensorboard/reward/mean"]] == list(range(1, STEPS + 1))
    return run_dir


def test_a_run_killed_in_every_phase_equals_an_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    schedules = [[moment, int(SIGKILL)] for moment in MOMENTS]
    assert attempts(tmp_path / "run", *schedules) == [-SIGKILL] * len(schedules) + [0]
    assert_same_run(tmp_path / "run", uninterrupted)
    assert rows(tmp_path / "run")[-1]["run/attempt"] == len(schedules) + 1


@pytest.mark.slow
def test_a_run_stopped_in_every_phase_equals_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path
) -> None:
    schedules = [
        ["saving", int(SIGTERM)],
        ["warm start", int(SIGTERM)],
        ["evaluation", int(SIGTERM)],
        ["generation", int(SIGUSR1)],
        ["training", int(SIGUSR1)],
    ]
    codes = attempts(tmp_path / "run", *schedules)
    assert codes == [EXIT_PREEMPTED] * len(schedules) + [0]
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_with_experts_killed_in_every_phase_equals_another(
    tmp_path: Path,
) -> None:
    command = (*COMMAND, "policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=24")
    assert attempts(tmp_path / "uninterrupted", command=command) == [0]
    assert all("experts/dead" in row for row in rows(tmp_path / "uninterrupted")[1:])
    schedules = [[moment, int(SIGKILL)] for moment in MOMENTS]
    codes = attempts(tmp_path / "run", *schedules, command=command)
    assert codes == [-SIGKILL] * len(schedules) + [0]
    assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_max_minutes_stops_the_run_like_a_signal(tmp_path: Path) -> None:
    """Each attempt has time for exactly one step."""
    command = (*COMMAND, "run.max_minutes=1e-9", "warm_start.steps=1", "train.steps=2")
    codes = attempts(tmp_path / "run", None, command=command)
    assert codes == [EXIT_PREEMPTED] * 2
    assert [row["run/attempt"] for row in rows(tmp_path / "run", "warm_start.jsonl")] == [1]
    assert [row["run/attempt"] for row in rows(tmp_path / "run")] == [2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_thirty_quickstart_steps_are_the_same_with_and_without_kills(tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    command = ("resume=auto", "train.steps=30", "eval.every_steps=10", "eval.problems=256")
    command = (*command, "checkpoint.every_steps=10")
    assert attempts(uninterrupted, command=command, reward=("--real",)) == [0]
    schedules = [[moment, int(SIGKILL)] for moment in MOMENTS]
    codes = attempts(killed, *schedules, command=command, reward=("--real",))
    assert codes == [-SIGKILL] * len(schedules) + [0]
    assert_same_run(killed, uninterrupted)
