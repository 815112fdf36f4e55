"""Objectives as functions of one token: log π(y) and that token's columns → loss and ∂loss/∂log π.

The LM head (`kernels/lm_head.py`) computes the logits of one chunk of tokens at a time, gets the
coefficient c = ∂L/∂log π from the objective, and writes the gradient with respect to the logits,
c·(onehot − π)/T.  In exact on-policy OPO the coefficient is −A/N, without a ratio or a clip.  The objectives
that it is compared with are in `objectives/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opo_megatron.algorithm.config import AlgorithmConfig, LossNormalizer, MismatchAction, OnPolicyConfig


class Objective(Protocol):
    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the batch columns that it reads."""
        ...

    @property
    def temperature(self) -> float:
        """T of the π_T in the loss."""
        ...

    @property
    def learns_from_demonstrations(self) -> bool:
        """Whether it trains on demonstrations instead of rollouts."""
        ...

    def __call__(self, log_prob: Tensor, columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, ∂loss/∂log_prob) of each token, float32, for log_prob [tokens]."""
        ...


@dataclass(frozen=True)
class PolicyGradient:
    """OPO's objective for any baseline: −(1/N) Σᵢ Aᵢ Σₜ wᵢₜ log π_T(yᵢₜ | …).

    w = 1, or with `on_policy.action=correct` w = min(π_policy / π_engine, cap), without gradient.
    """

    normalizer: float
    """N."""
    temperature: float
    max_importance_weight: float | None = None
    """The cap; None: w = 1."""
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
    """OPO's objective for a batch; `lengths` [n] are the response lengths of all its samples."""
    corrects = on_policy.action is MismatchAction.correct
    cap = on_policy.max_importance_weight if corrects else None
    return PolicyGradient(loss_normalizer(algorithm, lengths), temperature, cap)


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
    """N, from the response lengths [n] of all samples of the batch.

    `tokens` divides by a random variable, a bias of O(1/batch); `constant` is unbiased.
    """
    if algorithm.loss_normalizer is LossNormalizer.tokens:
        return max(1.0, float(lengths.sum()))
    if algorithm.loss_normalizer is LossNormalizer.sequences:
        return float(lengths.numel())
    assert algorithm.loss_constant is not None  # resolved when the recipe was loaded
    return algorithm.loss_constant
