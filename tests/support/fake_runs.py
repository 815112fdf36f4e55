"""Run folders in the format of a run, without training."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import load_config, to_yaml
from tests.support.paths import RECIPES

RECIPE = RECIPES / "quickstart.yaml"
BYTES = (
    "task.name=text", "task.data=none.jsonl", "warm_start.steps=0", "policy.model.max_sequence_length=900",
)  # fmt: skip
"""Overrides of a run with the byte tokenizer."""
HOSTILE = "</script><img src=x onerror=alert(1)><!-- $x^2$ &amp;"


def make_run(
    folder: Path, *overrides: str, steps: int = 6, evaluated: bool = True, texts: Sequence[str] = ()
) -> Path:
    """A run folder of the quickstart (with BYTES: of text) that finished `steps` of 6 steps.

    Args:
        overrides: of the recipe; run.seed changes the metrics.
        texts: prompt and responses of every group.
    """
    all_overrides = [f"run.dir={folder}", "train.steps=6", *overrides]
    config = load_config(RECIPE, all_overrides, 1)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = [_row(step, config.run.seed, evaluated) for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(1, steps + 1):
        dump(folder, step, texts or ("9-4+2+1+4-4=", "#5$", "5,7,8,9,5#5$", "#3$", "#4$"))
    return folder


def _row(step: int, seed: int, evaluated: bool) -> dict[str, Any]:
    noise = random.Random(100 * seed + step).uniform(-0.02, 0.02)
    row: dict[str, Any] = {"step": step, "run/attempt": 1, "time/audit": 0.01}
    if step:
        row |= {
            "reward/mean": 0.5 + 0.05 * step + noise, "entropy": 1.0 / step, "grad_norm": 0.3 + noise,
            "response_length/mean": 6.0 + step, "tokens/response": 100, "on_policy/logprob_diff_max": 1e-6,
            "time/rollout": 0.2, "time/train": 0.5, "time/step": 1.0, "lr": 3e-4,
        }  # fmt: skip
    if evaluated and step % 3 == 0:
        row |= {"eval/accuracy": 0.5 + 0.05 * step + noise, "eval/problems": 8, "eval/kl": 0.01 * step}
    return row


def dump(folder: Path, step: int, texts: Sequence[str]) -> None:
    """Writes the rollouts of a step: eight groups of the same prompt, the first response rewarded."""
    from opo_megatron.tasks.lift import SYMBOLS

    is_lift = all(character in SYMBOLS for text in texts for character in text)
    encode = (lambda text: [SYMBOLS.index(c) for c in text]) if is_lift else (lambda text: [*text.encode()])
    prompt, *responses = map(encode, texts)
    rollouts = Rollouts.from_demonstrations([prompt] * (8 * len(responses)), responses * 8)
    rollouts.is_demonstration = False
    count = len(rollouts)
    rollouts.groups = torch.arange(count) // len(responses)
    rollouts.sample_indices = torch.arange(count) % len(responses)
    rollouts.rewards = (rollouts.sample_indices == 0).double()
    rollouts.advantages = rollouts.rewards - 1 / len(responses)
    rollouts.engine_log_prob = -torch.linspace(0, 6, rollouts.response_tokens.numel())
    rollouts.save(folder / "rollouts" / f"step_{step:08d}.safetensors")
