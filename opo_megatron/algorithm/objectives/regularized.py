"""Objectives that pull the policy back by a regression: of log-ratios to 0 or to rewards, or of the ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opo_megatron.algorithm.objectives.tokens import Derives, SampleTokens


@dataclass(frozen=True)
class Regularized:
    """What the objectives of this file share."""

    normalizer: float
    temperature: float
    columns: tuple[str, ...]
    learns_from_demonstrations: bool = False


def penalized(
    log_prob: Tensor, columns: dict[str, Tensor], penalty: float, normalizer: float
) -> tuple[Tensor, Tensor]:
    """(1/N) [−A ℓ + penalty (ℓ − o)²/2], differentiated as it is."""
    advantages, difference = columns["advantages"], log_prob - columns["old_log_prob"]
    loss = penalty / 2 * difference.square() - advantages * log_prob
    return loss / normalizer, -(advantages - penalty * difference) / normalizer


@dataclass(frozen=True)
class Dro(Regularized):
    """DRO: policy gradient with a quadratic penalty of the log-ratio to the old policy."""

    beta: float = 1.0

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return penalized(log_prob, columns, self.beta, self.normalizer)


@dataclass(frozen=True)
class Kimi(Regularized):
    """Kimi k1.5: the same formula as DRO's; its coefficient has another name and a default."""

    tau: float = 0.1

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return penalized(log_prob, columns, self.tau, self.normalizer)


def log_mean_exp(rewards: Tensor, beta: float) -> Tensor:
    """β log mean exp(r/β), the value of a prompt under a KL to the sampling policy."""
    return beta * (torch.logsumexp(rewards / beta, 0) - math.log(len(rewards)))


@dataclass(frozen=True)
class Oapl(Regularized, Derives):
    """OAPL: (1/N) Σᵢ gᵢ² with g = β₂ Σₜ(ℓ − μ) − (r − V), V = β₁ log mean exp(r/β₁) of the prompt.

    Every token of a response has the coefficient ∂g²/∂ℓ = 2 β₂ g; its share of the loss is g²/length.
    g is computed before the gradient, from the policy that it is taken of.  Advantages are not used.
    """

    beta_1: float = 0.5
    beta_2: float = 1e-3

    def derive(self, tokens: SampleTokens) -> dict[str, Tensor]:
        columns, rewards = tokens.columns, tokens.rewards[tokens.samples]
        values = tokens.of_groups(partial(log_mean_exp, beta=self.beta_1))
        log_ratios = tokens.sums(columns["current_log_prob"] - columns["engine_log_prob"])
        residuals = self.beta_2 * log_ratios - (rewards - values)
        return {
            "residual": tokens.spread(residuals),
            "response_length": tokens.spread(tokens.lengths.double()),
        }

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        residual = columns["residual"]
        loss = residual.square() / columns["response_length"] / self.normalizer
        return loss, 2 * self.beta_2 * residual / self.normalizer


@dataclass(frozen=True)
class Brrl(Regularized, Derives):
    """GBPO: (1/N) |A| |ρ − t|, differentiated as it is; t is 1 − low or 1 + high, by the sign of r − m.

    m is the median of the prompt's rewards, the mean of the middle two for an even number.
    """

    epsilon_low: float = 0.3
    epsilon_high: float = 0.3
    target_temperature: float = 1e-4

    def derive(self, tokens: SampleTokens) -> dict[str, Tensor]:
        medians = tokens.of_groups(lambda rewards: rewards.quantile(0.5))
        above = tokens.rewards[tokens.samples] - medians
        # 1 exactly at the median where both ends are equally far.
        share = (self.epsilon_low + self.epsilon_high) * torch.sigmoid(above / self.target_temperature)
        return {"target_ratio": tokens.spread(1 + (share - self.epsilon_low))}

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        ratio = (log_prob - columns["old_log_prob"]).exp()
        weight, distance = columns["advantages"].abs() / self.normalizer, ratio - columns["target_ratio"]
        return weight * distance.abs(), weight * (distance.sign() * ratio)
