"""A run that is struck at any moment and started again by the same command is the run that never was.

Moments are watched from inside (struck_run.py), never by the clock.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1
from typing import Any

import pytest
from small import RECIPE, SMALL_MODEL
from struck_run import MOMENTS
from tiny_run import lasting, rows

from opo_megatron.errors import EXIT_PREEMPTED

STRUCK_RUN = Path(__file__).parent / "struck_run.py"
STEPS = 6
COMMAND = (
    *SMALL_MODEL,
    "policy.model.num_layers=2",
    "policy.max_tokens_per_micro_batch=1000",
    "resume=auto",
    "warm_start.steps=20",
    f"train.steps={STEPS}",
    "rollout.prompts_per_step=6",
    "rollout.samples_per_prompt=4",
    "optimizer.schedule=cosine",
    "eval.every_steps=3",
    "eval.problems=16",
    "checkpoint.every_steps=4",
    "algorithm.baseline=auto",  # which remembers something
    "algorithm.variance_every=2",
)
FILES = ("metrics.jsonl", "warm_start.jsonl", "audit.jsonl")


def attempts(
    run_dir: Path, *schedules: Any, command: tuple[str, ...] = COMMAND, reward: tuple[str, ...] = ()
) -> list[int]:
    """Exit codes of one attempt per plan and a last one that is left alone, each by the same command."""
    arguments = [*reward, "train", str(RECIPE), f"run.dir={run_dir}", *command]
    line = [sys.executable, str(STRUCK_RUN), json.dumps([*schedules, None]), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def last_weights(run_dir: Path) -> dict[str, Any]:
    """What the manifest of the last checkpoint says of all tensors, optimizer state included."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return {name: entry for name, entry in manifest.items() if name.endswith(".distcp")}


def assert_same_run(run_dir: Path, calm: Path) -> None:
    for name in FILES:
        assert lasting(run_dir, name) == lasting(calm, name), name
    assert last_weights(run_dir) == last_weights(calm) != {}
    dumps = sorted((calm / "rollouts").iterdir())
    assert [path.name for path in dumps] == sorted(path.name for path in (run_dir / "rollouts").iterdir())
    for path in dumps:
        assert path.read_bytes() == (run_dir / "rollouts" / path.name).read_bytes(), path.name
    assert curves(run_dir) == curves(calm)


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard draws."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn = {}
    for folder in (run_dir / "tensorboard", run_dir / "tensorboard" / "warm_start"):
        board = EventAccumulator(str(folder))
        board.Reload()
        for name in ("reward/mean", "loss", "eval/accuracy", "grad_norm"):
            if name in board.Tags()["scalars"]:
                drawn[f"{folder.name}/{name}"] = [(e.step, e.value) for e in board.Scalars(name)]
    return drawn


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Started once, struck by nothing."""
    run_dir = tmp_path_factory.mktemp("runs") / "calm"
    assert attempts(run_dir) == [0]
    assert [row["step"] for row in rows(run_dir)] == list(range(STEPS + 1))
    assert [step for step, _ in curves(run_dir)["tensorboard/reward/mean"]] == list(range(1, STEPS + 1))
    return run_dir


def test_a_run_that_is_killed_once_in_every_phase_is_the_run_that_never_was(
    calm: Path, tmp_path: Path
) -> None:
    schedules = [[moment, int(SIGKILL)] for moment in MOMENTS]
    assert attempts(tmp_path / "run", *schedules) == [-SIGKILL] * len(schedules) + [0]
    assert_same_run(tmp_path / "run", calm)
    assert rows(tmp_path / "run")[-1]["run/attempt"] == len(schedules) + 1


def test_a_run_that_is_told_to_end_in_every_phase_is_the_run_that_never_was(
    calm: Path, tmp_path: Path
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
