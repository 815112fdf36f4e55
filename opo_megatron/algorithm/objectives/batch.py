"""Objectives whose clips or masks are chosen by the tokens of the whole mini-batch, before the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.algorithm.objectives.tokens import Derives, SampleTokens

SMALL = 1e-8
"""Added to the sum of negative contributions, as in BAPO's code."""


@dataclass(frozen=True)
class OfBatch(Derives):
    """What the objectives of this file share."""

    normalizer: float
    temperature: float
    columns: tuple[str, ...]
    learns_from_demonstrations: bool = False


@dataclass(frozen=True)
class Bapo(OfBatch):
    """BAPO: PPO with a dual clip, whose bounds [l, h] are widened until positive samples weigh enough.

    (1/N) −min(ρ A, clip(ρ, l, h) A), at most −dual_clip A where A < 0, differentiated as it is; the bounds
    are columns, found from the policy that the gradient is taken of.
    """

    low: float = 0.6
    highest_low: float = 0.8
    high: float = 1.2
    highest_high: float = 2.0
    step: float = 0.05
    target: float = 1.0
    dual_clip: float = 3.0

    def derive(self, tokens: SampleTokens) -> dict[str, Tensor]:
        advantages = tokens.columns["advantages"]
        ratio = (tokens.columns["current_log_prob"] - tokens.columns["old_log_prob"]).exp()
        low, high = self._bounds(ratio, advantages)
        return {"ratio_low": torch.full_like(ratio, low), "ratio_high": torch.full_like(ratio, high)}

    def _bounds(self, ratio: Tensor, advantages: Tensor) -> tuple[float, float]:
        """l is raised first, then h, in steps, while the positive part is too small."""
        low, high = self.low, self.high
        while self._balance(ratio, advantages, low, high) < self.target and low < self.highest_low:
            low = min(low + self.step, self.highest_low)
        while self._balance(ratio, advantages, low, high) < self.target and high < self.highest_high:
            high = min(high + self.step, self.highest_high)
        return low, high

    def _balance(self, ratio: Tensor, advantages: Tensor, low: float, high: float) -> float:
        """Sum of positive over sum of negative contributions, each with its ratio clipped on one side."""
        one_sided = torch.where(advantages >= 0, ratio.clamp(max=high), ratio.clamp(min=low))
        contributions = one_sided * advantages
        positive, negative = contributions.clamp(min=0).sum(), -contributions.clamp(max=0).sum()
        return float(positive / (negative + SMALL)) if negative > 0 else float("inf")

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        advantages = columns["advantages"]
        ratio = (log_prob - columns["old_log_prob"]).exp()
        unclipped = ratio * advantages
        clipped = ratio.clamp(columns["ratio_low"], columns["ratio_high"]) * advantages
        loss = -torch.minimum(unclipped, clipped)
        most = torch.where(advantages < 0, -self.dual_clip * advantages, torch.inf)
        coefficient = torch.where((unclipped <= clipped) & (loss <= most), -unclipped, 0.0)
        return torch.minimum(loss, most) / self.normalizer, coefficient / self.normalizer


@dataclass(frozen=True)
class M2po(OfBatch):
    """M2PO: −(1/N) A ρ M, differentiated as it is, but for the mask M.

    The trust region's tokens are those that A pushes further, A(ℓ − o) > 0.  Those with the largest (ℓ − o)²
    are masked, until the mean over the others is at most the threshold.
    """

    threshold: float = 0.04

    def derive(self, tokens: SampleTokens) -> dict[str, Tensor]:
        advantages = tokens.columns["advantages"]
        difference = tokens.columns["current_log_prob"] - tokens.columns["old_log_prob"]
        pushed = ((advantages.sign() * difference.sign()) > 0).nonzero()[:, 0]
        # Equal values keep their order, which is that of the batch.
        squares, order = difference[pushed].square().sort(stable=True)
        means = squares.cumsum(0) / torch.arange(1, len(squares) + 1)
        kept = torch.ones_like(difference)
        kept[pushed[order[int((means <= self.threshold).sum()) :]]] = 0
        return {"kept": kept}

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio = (log_prob - columns["old_log_prob"]).exp()
        masked = -columns["advantages"] * ratio
        loss = torch.where(columns["kept"] > 0, masked, 0.0) / self.normalizer
        return loss, loss
