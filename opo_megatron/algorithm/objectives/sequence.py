"""Objectives with one ratio for a whole response."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.algorithm.objectives.tokens import Derives, SampleTokens


@dataclass(frozen=True)
class Gspo(Derives):
    """GSPO by tokens: −(1/N) min(s A, clip(s, 1 − low, 1 + high) A), s = exp of the response's mean of ℓ − o.

    s is computed before the gradient.  A token's value is s, its derivative that of s·exp(ℓ − sg(ℓ)), so
    c = −(1/N) A s where the minimum is s A, else 0.  GSPO averages over each response first; here N is the
    recipe's (`algorithm.loss_normalizer`).
    """

    normalizer: float
    temperature: float
    columns: tuple[str, ...]
    learns_from_demonstrations: bool = False
    epsilon_low: float = 3e-4
    epsilon_high: float = 4e-4

    def derive(self, tokens: SampleTokens) -> dict[str, Tensor]:
        differences = tokens.columns["current_log_prob"] - tokens.columns["old_log_prob"]
        means = tokens.sums(differences) / tokens.lengths.clamp(min=1)
        return {"sequence_ratio": tokens.spread(means.exp())}

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio, advantages = columns["sequence_ratio"], columns["advantages"]
        unclipped = ratio * advantages
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high) * advantages
        loss = -torch.minimum(unclipped, clipped)
        coefficient = torch.where(unclipped <= clipped, -unclipped, 0.0)
        return loss / self.normalizer, coefficient / self.normalizer
