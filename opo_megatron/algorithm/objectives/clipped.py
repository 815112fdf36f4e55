"""Objectives that clip the ratio to the old policy, ρ = π/π_old, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clipped:
    """The objective of PPO and GRPO: with ρ = π(y)/π_old(y) and δ = log π_reference(y) − log π(y),

        (1/N) Σᵢ Σₜ [ −min(ρ A, clip(ρ, 1 − low, 1 + high) A) + β (exp(δ) − 1 − δ) ]

    With β = 0 and π = π_old its gradient is that of `PolicyGradient`.
    """

    normalizer: float
    temperature: float
    low: float
    high: float
    kl_coefficient: float = 0.0
    """β."""
    learns_from_demonstrations: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return ("advantages", "old_log_prob", *(("reference_log_prob",) if self.kl_coefficient else ()))

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        advantages = columns["advantages"]
        ratio = (log_prob - columns["old_log_prob"]).exp()
        unclipped, clipped = ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages
        loss = -torch.minimum(unclipped, clipped)
        coefficient = torch.where(unclipped <= clipped, -unclipped, 0.0)
        if self.kl_coefficient:
            delta = columns["reference_log_prob"] - log_prob
            loss = loss + self.kl_coefficient * (torch.expm1(delta) - delta)
            coefficient = coefficient - self.kl_coefficient * torch.expm1(delta)
        return loss / self.normalizer, coefficient / self.normalizer


@dataclass(frozen=True)
class OldRatio:
    """What objectives share whose weight is a function of the ratio to the old policy."""

    normalizer: float
    temperature: float
    columns: tuple[str, ...]
    learns_from_demonstrations: bool = False

    def weighted(
        self, log_prob: Tensor, columns: dict[str, Tensor], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """−(1/N) A w ℓ and its derivative with respect to ℓ; w carries no gradient."""
        coefficient = -columns["advantages"] / self.normalizer * weights
        return coefficient * log_prob, coefficient


@dataclass(frozen=True)
class Cispo(OldRatio):
    """CISPO: the weight is the clipped ratio, so every token keeps a gradient."""

    epsilon_low: float = 10.0
    epsilon_high: float = 0.2

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio = (log_prob - columns["old_log_prob"]).exp()
        return self.weighted(log_prob, columns, ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high))


@dataclass(frozen=True)
class Topr(OldRatio):
    """TOPR: weight 1 where the reward is positive, else the ratio, at most 1."""

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio = (log_prob - columns["old_log_prob"]).exp()
        weights = torch.where(columns["rewards"] > 0, 1.0, ratio.clamp(max=1.0))
        return self.weighted(log_prob, columns, weights)


@dataclass(frozen=True)
class RecRing(OldRatio):
    """REC with the ring: weight 1 near ratio 1, and far from it where A pulls the ratio back; else 0."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    outer_low: float = 0.6
    outer_high: float = 2.0

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio, advantages = (log_prob - columns["old_log_prob"]).exp(), columns["advantages"]
        inner = (ratio >= 1 - self.epsilon_low) & (ratio <= 1 + self.epsilon_high)
        below = (advantages >= 0) & (ratio <= 1 - self.outer_low)
        above = (advantages <= 0) & (ratio >= 1 + self.outer_high)
        return self.weighted(log_prob, columns, (inner | below | above).to(ratio.dtype))


@dataclass(frozen=True)
class Sapo(OldRatio):
    """SAPO: −(1/N) A (4/τ) sigmoid(τ(ρ − 1)), differentiated as it is; τ by the sign of A."""

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio, advantages = (log_prob - columns["old_log_prob"]).exp(), columns["advantages"]
        negative = torch.full_like(ratio, self.tau_negative)  # of two numbers, `where` makes float32
        tau = torch.where(advantages > 0, self.tau_positive, negative)
        gate = torch.sigmoid(tau * (ratio - 1))
        scaled = -advantages / self.normalizer
        return scaled * (4 / tau) * gate, scaled * (4 * gate * (1 - gate) * ratio)
