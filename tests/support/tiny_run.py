"""A complete run of a tiny recipe, and its metrics rows for comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opo_megatron.cli.main import main
from opo_megatron.config.rules.resilience import VOLATILE
from opo_megatron.tasks.lift import LiftTask
from tests.support.fixtures import RECIPE, SMALL_MODEL

STEPS = 4
TINY = (
    *SMALL_MODEL,
    "warm_start.steps=6",
    f"train.steps={STEPS}",
    "rollout.prompts_per_step=6",
    "rollout.samples_per_prompt=4",
    "optimizer.schedule=cosine",
    "eval.every_steps=2",
    "eval.problems=16",
    "checkpoint.every_steps=2",
)

ONE_STEP = (
    "warm_start.steps=0", "train.steps=1", "eval.every_steps=0", "eval.problems=1", "eval.greedy=false",
    "observe.kl=off", "checkpoint.every_steps=0",
)  # fmt: skip
"""A single step from random weights."""


def easy_reward(self: LiftTask, prompt: Any, response: list[int]) -> float:
    """In place of `LiftTask.reward`, which a tiny policy never earns: 1 for half of its responses."""
    return float(sum(response) % 2)


def train(run_dir: Path, *overrides: str) -> int:
    return main(["train", str(RECIPE), f"run.dir={run_dir}", *TINY, *overrides])


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def lasting(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Rows without the metrics that may differ between identical runs (timings, attempts)."""
    return [{k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows(run_dir, name)]
