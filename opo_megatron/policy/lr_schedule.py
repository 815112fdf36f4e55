"""The learning rate as a stateless function of the step, so resuming needs only the step."""

from __future__ import annotations

import math

from opo_megatron.config.choices import Schedule
from opo_megatron.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (the first is 1) out of `total_steps`.

    Linear warm-up to `lr` over `warmup_steps`, then constant, linear or cosine down to
    `min_lr_ratio · lr` at `total_steps`.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule is Schedule.constant:
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    progress = min(1.0, progress)
    remaining = 1 - progress if config.schedule is Schedule.linear else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
