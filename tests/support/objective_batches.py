"""Random ragged batches of log-probabilities, for objectives: pure functions of a number, in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

BATCHES = 200


@dataclass(frozen=True)
class ObjectiveBatch:
    """n responses of prompts with several responses each; columns [Σl] float64."""

    lengths: Tensor
    groups: Tensor
    rewards: Tensor
    log_prob: Tensor
    old: Tensor
    engine: Tensor
    sample_advantages: Tensor

    @property
    def advantages(self) -> Tensor:
        """[Σl]."""
        return torch.repeat_interleave(self.sample_advantages, self.lengths)


def objective_batch(number: int) -> ObjectiveBatch:
    """Ratios from 0.05 to 20, rewards with ties, some advantages 0, lengths from 1 to 9."""
    rng = random.Random(number)
    groups = [group for group in range(rng.randint(1, 4)) for _ in range(rng.randint(2, 5))]
    lengths = [rng.randint(1, 9) for _ in groups]
    rewards = [rng.choice([0.0, 0.0, 1.0, 1.0, -0.5, 0.3]) for _ in groups]
    advantages = [0.0 if rng.random() < 0.1 else rng.gauss(0.1, 1.0) for _ in groups]
    spread = rng.choice([0.05, 0.3, 1.0])
    columns = []
    for _ in range(sum(lengths)):
        old = -rng.expovariate(1.0) - 1e-3
        now = min(old + rng.gauss(0.0, spread), -1e-4)
        columns.append((now, old, min(old + rng.gauss(0.0, spread / 3), -1e-4)))
    return ObjectiveBatch(
        torch.tensor(lengths),
        torch.tensor(groups),
        torch.tensor(rewards, dtype=torch.float64),
        *torch.tensor(columns, dtype=torch.float64).T.contiguous(),
        torch.tensor(advantages, dtype=torch.float64),
    )
