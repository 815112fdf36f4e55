"""Objectives as functions of one token: log π(y) and that token's columns → loss and ∂loss/∂log π.

All training goes through one head (`kernels/lm_head.py`), which knows the logits of a few tokens at a
time, asks the objective for the coefficient c = ∂L/∂log π, and writes the gradient with respect to
the logits, c·(onehot − π)/T.  In exact on-policy OPO that coefficient, −A/N, is known before the
forward pass; that no ratio and no clip appear here is the point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opo_megatron.algorithm.config import AlgorithmConfig, LossNormalizer, MismatchAction, OnPolicyConfig


class Objective(Protocol):
    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the batch that it reads."""
        ...

    @property
    def temperature(self) -> float:
        """T of the π_T that it differentiates."""
        ...

    @property
    def learns_from_demonstrations(self) -> bool:
        """Whether its batches are demonstrations rather than an engine's rollouts."""
        ...

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, ∂loss/∂log_prob) of each token, float32, for log_prob [tokens]."""
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """−(1/N) Σᵢ Aᵢ Σₜ wᵢₜ log π_T(yᵢₜ | …): OPO's objective, whatever the baseline behind A.

    w = 1, unless the engine is corrected for: then w = min(π_policy / π_engine, cap), held constant.
    """

    normalizer: float
    """N."""
    temperature: float
    max_importance_weight: float | None = None
    """The cap; None trusts the engine."""
    learns_from_demonstrations: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return ("advantages",) if self.max_importance_weight is None else ("advantages", "engine_log_prob")

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        coefficient = -columns["advantages"] / self.normalizer
        if self.max_importance_weight is not None:
            ratio = (log_prob - columns["engine_log_prob"]).exp()
            coefficient = coefficient * ratio.clamp(max=self.max_importance_weight)
        return coefficient * log_prob, coefficient


def opo_objective(
    algorithm: AlgorithmConfig, on_policy: OnPolicyConfig, lengths: Tensor, temperature: float
) -> PolicyGradient:
    """OPO's objective for a batch with response lengths [n], of all of its samples."""
    corrects = on_policy.action is MismatchAction.correct
    cap = on_policy.max_importance_weight if corrects else None
    return PolicyGradient(loss_normalizer(algorithm, lengths), temperature, cap)


@dataclass(frozen=True)
class Clipped:
    """The objective of PPO and GRPO: with ρ = π(y)/π_old(y) and δ = log π_reference(y) − log π(y),

        (1/N) Σᵢ Σₜ [ −min(ρ A, clip(ρ, 1 − low, 1 + high) A) + β (exp(δ) − 1 − δ) ]

    Where π is still the policy that drew the samples and β is 0, its gradient is `PolicyGradient`'s.
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
        free, cut = ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages
        loss = -torch.minimum(free, cut)
        coefficient = torch.where(free <= cut, -free, 0.0)
        if self.kl_coefficient:
            delta = columns["reference_log_prob"] - log_prob
            loss = loss + self.kl_coefficient * (torch.expm1(delta) - delta)
            coefficient = coefficient - self.kl_coefficient * torch.expm1(delta)
        return loss / self.normalizer, coefficient / self.normalizer


@dataclass(frozen=True)
class Supervised:
    """−(1/N) Σᵢ Σₜ log π(yᵢₜ | …) of demonstrations."""

    normalizer: float
    temperature: float = 1.0
    columns: tuple[str, ...] = ()
    learns_from_demonstrations: bool = True

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        coefficient = log_prob.new_full(log_prob.shape, -1.0 / self.normalizer)
        return coefficient * log_prob, coefficient


def loss_normalizer(algorithm: AlgorithmConfig, lengths: Tensor) -> float:
    """N of the whole batch, from the response lengths [n] of all of its samples.

    `tokens` divides by a random number and is biased by O(1/batch); `constant` is not.
    """
    if algorithm.loss_normalizer is LossNormalizer.tokens:
        return max(1.0, float(lengths.sum()))
    if algorithm.loss_normalizer is LossNormalizer.sequences:
        return float(lengths.numel())
    assert algorithm.loss_constant is not None  # resolved when the recipe was loaded
    return algorithm.loss_constant
