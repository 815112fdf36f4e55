"""Policy gradients weighted by π/π_μ, whose masks drop tokens that have moved too far from the engine.

    c = −(1/N) A min(ρ_μ, cap) M,    ρ_μ = exp(ℓ − μ)

Weight and mask carry no gradient, so the loss is c·ℓ.  Without a mask it is `PolicyGradient` with a cap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 1e-8
"""Added to probabilities before a logarithm, as in the public code."""


@dataclass(frozen=True)
class Masked:
    """What the masked policy gradients share."""

    normalizer: float
    temperature: float
    columns: tuple[str, ...]
    learns_from_demonstrations: bool = False

    def masked(
        self, log_prob: Tensor, columns: dict[str, Tensor], cap: float, dropped: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and c, with the ratio to the engine capped, and 0 where a token is `dropped`."""
        ratio = (log_prob - columns["engine_log_prob"]).exp().clamp(max=cap)
        coefficient = torch.where(dropped, 0.0, -columns["advantages"] / self.normalizer * ratio)
        return coefficient * log_prob, coefficient


def beyond_total_variation(
    log_prob: Tensor, columns: dict[str, Tensor], delta_low: float, delta_high: float
) -> Tensor:
    """[n] bool: whether A pushes a token whose probability has moved by more than delta that way."""
    moved = log_prob.exp() - columns["engine_log_prob"].exp()
    return torch.where(columns["advantages"] > 0, moved > delta_high, moved < -delta_low)


@dataclass(frozen=True)
class DppoTv(Masked):
    """DPPO with the total variation of "this token or another": |π − π_μ| of the sampled token."""

    delta_low: float = 0.15
    delta_high: float = 0.15
    cap: float = 20.0

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        dropped = beyond_total_variation(log_prob, columns, self.delta_low, self.delta_high)
        return self.masked(log_prob, columns, self.cap, dropped)


@dataclass(frozen=True)
class DppoKl(Masked):
    """DPPO with KL(π_μ ‖ π) of "this token or another"."""

    delta_low: float = 0.05
    delta_high: float = 0.05
    cap: float = 20.0

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        engine = columns["engine_log_prob"]
        now, before = log_prob.exp(), engine.exp()
        divergence = before * (engine - log_prob)
        divergence = divergence + (1 - before) * ((1 - before + SMALL) / (1 - now + SMALL)).log()
        rises = (divergence > self.delta_high) & (now > before)
        falls = (divergence > self.delta_low) & (now < before)
        dropped = torch.where(columns["advantages"] > 0, rises, falls)
        return self.masked(log_prob, columns, self.cap, dropped)


@dataclass(frozen=True)
class MiniRl(Masked):
    """MiniRL: the weight is the ratio to the engine, the mask PPO's, of the ratio to the old policy."""

    epsilon_low: float = 0.2
    epsilon_high: float = 0.27
    cap: float = 10.0

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio = (log_prob - columns["old_log_prob"]).exp()
        rises, falls = ratio > 1 + self.epsilon_high, ratio < 1 - self.epsilon_low
        dropped = torch.where(columns["advantages"] > 0, rises, falls)
        return self.masked(log_prob, columns, self.cap, dropped)


@dataclass(frozen=True)
class PrimeRl(Masked):
    """prime-rl's default: (1/N) [−τ_A A ρ_μ M + τ_kl (ℓ − μ)²], differentiated as it is, but for M."""

    delta_low: float = 0.2
    delta_high: float = 0.2
    tau_advantage: float = 1.0
    tau_kl: float = 1e-3

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        difference = log_prob - columns["engine_log_prob"]
        gain = self.tau_advantage * columns["advantages"] * difference.exp()
        dropped = beyond_total_variation(log_prob, columns, self.delta_low, self.delta_high)
        gain = torch.where(dropped, 0.0, gain)
        loss = self.tau_kl * difference.square() - gain
        return loss / self.normalizer, -(gain - 2 * self.tau_kl * difference) / self.normalizer
