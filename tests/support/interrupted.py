"""Interrupted and resumed runs against an uninterrupted run: command, attempts, comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.fixtures import RECIPE, SMALL_MODEL
from tests.support.paths import WORKERS
from tests.support.tiny_run import lasting

INTERRUPTED_RUN = WORKERS / "interrupted_run.py"
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
    "algorithm.baseline=auto",  # has state in the checkpoint
    "algorithm.variance_every=2",
)
FILES = ("metrics.jsonl", "warm_start.jsonl", "audit.jsonl")


def attempts(
    run_dir: Path,
    *schedules: Any,
    command: tuple[str, ...] = COMMAND,
    reward: tuple[str, ...] = (),
    timeout: float = 1000,
) -> list[int]:
    """Exit codes of one attempt per fault schedule and an uninterrupted last one, all of the same command."""
    arguments = [*reward, "train", str(RECIPE), f"run.dir={run_dir}", *command]
    argv = [sys.executable, str(INTERRUPTED_RUN), json.dumps([*schedules, None]), *arguments]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout.splitlines()[-1]))


def last_weights(run_dir: Path) -> dict[str, Any]:
    """Manifest entries of the last checkpoint's tensors, optimizer state included."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    manifest = json.loads((newest / "manifest.json").read_text())
    return {name: entry for name, entry in manifest.items() if name.endswith(".distcp")}


def assert_same_run(run_dir: Path, uninterrupted: Path) -> None:
    for name in FILES:
        assert lasting(run_dir, name) == lasting(uninterrupted, name), name
    assert last_weights(run_dir) == last_weights(uninterrupted) != {}
    dumps = sorted((uninterrupted / "rollouts").iterdir())
    assert [path.name for path in dumps] == sorted(path.name for path in (run_dir / "rollouts").iterdir())
    for path in dumps:
        assert path.read_bytes() == (run_dir / "rollouts" / path.name).read_bytes(), path.name
    assert curves(run_dir) == curves(uninterrupted)


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's (step, value) pairs by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for folder in (run_dir / "tensorboard", run_dir / "tensorboard" / "warm_start"):
        events = EventAccumulator(str(folder))
        events.Reload()
        for name in ("reward/mean", "loss", "eval/accuracy", "grad_norm"):
            if name in events.Tags()["scalars"]:
                scalars[f"{folder.name}/{name}"] = [(e.step, e.value) for e in events.Scalars(name)]
    return scalars
