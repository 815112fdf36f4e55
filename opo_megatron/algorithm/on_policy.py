"""The on-policy check: every step proves that its rollouts were sampled from the current weights.

Two checks per step.  The weight version of every token must be the policy's.  And the policy's
log-probabilities of the sampled tokens, which the training pass computes anyway, must agree with those
that the engine recorded during sampling: Δ = log π_policy − log π_engine, over all tokens.

For an engine that cannot be made to agree, `on_policy.action=correct` weights every token by
min(exp(Δ), cap), the truncated importance weights of Ionides (2008).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.algorithm.config import MismatchAction, OnPolicyConfig
from opo_megatron.errors import OnPolicyError


def k3(delta: Tensor) -> Tensor:
    """exp(Δ) − 1 − Δ ≥ 0 per token: its mean over the engine's samples estimates KL(engine ‖ policy)."""
    return torch.expm1(delta) - delta


HISTOGRAM = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Thresholds of |Δ| for the mismatch distribution."""


@dataclass(frozen=True)
class Mismatch:
    """Δ between engine and policy over all tokens of a step."""

    max: float
    mean: float
    k3: float
    ess: float = 1.0
    """Effective sample size (Σw)² / Σw², w = exp(Δ), as a share of the tokens."""
    above: tuple[float, ...] = ()
    """Share of tokens with |Δ| above each of `HISTOGRAM`."""


class MismatchSums:
    """Running sums over the tokens of a step; ranks are combined by sum, `highest` by maximum."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4 + len(HISTOGRAM), dtype=torch.float64, device=device)
        self.highest = torch.zeros((), dtype=torch.float64, device=device)
        self.edges = torch.tensor(HISTOGRAM, dtype=torch.float64, device=device)

    def add(self, delta: Tensor) -> None:
        """Add tokens with Δ = log π_policy − log π_engine [n]."""
        delta = delta.double()
        size, weight = delta.abs(), delta.exp()
        sums = torch.stack((size.sum(), k3(delta).sum(), weight.sum(), weight.square().sum()))
        bucket = torch.bucketize(size, self.edges)
        above = torch.bincount(bucket, minlength=len(HISTOGRAM) + 1).flip(0).cumsum(0).flip(0)[1:]
        self.values += torch.cat((sums, above.double()))
        torch.maximum(self.highest, size.max(), out=self.highest)

    def add_partial(self, partial: Tensor) -> None:
        """Add the partial sums of a kernel.

        Args:
            partial: [4 + len(HISTOGRAM) + 1, parts] float64: the rows of `values`, then the largest |Δ|.
        """
        self.values += partial[:-1].sum(1)
        torch.maximum(self.highest, partial[-1].max(), out=self.highest)

    @staticmethod
    def result(values: list[float], highest: float, tokens: float) -> Mismatch:
        """The statistics from the sums over all ranks."""
        size, divergence, weight, squares, *above = values
        ess = weight**2 / squares / tokens if squares > 0 else math.nan
        shares = tuple(count / tokens for count in above)
        return Mismatch(highest, size / tokens, divergence / tokens, ess, shares)


def check_versions(weight_versions: Tensor | None, expected: int) -> None:
    """Check that every token was sampled with weight version `expected`.

    Raises:
        OnPolicyError: with the number of tokens per wrong version.
    """
    if weight_versions is None:
        raise OnPolicyError("the engine reported no weight versions, so the rollouts cannot be trained on")
    if wrong := _other_versions(weight_versions, expected):
        raise OnPolicyError(
            f"the policy is at weight version {expected} but {wrong}; send the weights before generating"
        )


def check_age(weight_versions: Tensor | None, version: int, age: int) -> None:
    """Check that every token was sampled with the weights of exactly `age` optimizer steps before `version`.

    Raises:
        OnPolicyError: with the number of tokens per wrong version.
    """
    if weight_versions is None:
        raise OnPolicyError("the rollouts have no weight versions, so their age is not known")
    if wrong := _other_versions(weight_versions, version - age):
        raise OnPolicyError(
            f"the policy is at weight version {version} and trains on rollouts of version {version - age}, "
            f"but {wrong}; resume from a checkpoint (resume=auto), which has rollouts of the right age"
        )


def _other_versions(weight_versions: Tensor, expected: int) -> str | None:
    """How many tokens are of other versions than `expected`, with their number per version; None if none."""
    wrong = weight_versions[weight_versions != expected]
    if wrong.numel() == 0:
        return None
    counts = ", ".join(f"{n} of version {v}" for v, n in sorted(Counter(wrong.tolist()).items()))
    return f"{wrong.numel()} of {weight_versions.numel()} sampled tokens are not ({counts})"


def check_mismatch(config: OnPolicyConfig, mismatch: Mismatch) -> str | None:
    """Check the largest |Δ| of a step against the tolerance; called before the optimizer step.

    Returns:
        A warning to log where the tolerance is exceeded and action is warn or correct, else None.

    Raises:
        OnPolicyError: beyond the tolerance with action=refuse, or where Δ is not finite.
    """
    if not all(math.isfinite(value) for value in (mismatch.max, mismatch.mean, mismatch.k3)):
        raise OnPolicyError(
            f"engine and policy cannot be compared (mean difference {mismatch.mean} of log-probabilities), "
            "because weights or logits are not finite; resume from a checkpoint with a smaller optimizer.lr"
        )
    if mismatch.max <= config.tolerance:
        return None
    message = (
        f"engine and policy disagree by {mismatch.max:.3g} in a token's log-probability (mean "
        f"{mismatch.mean:.3g}), more than on_policy.tolerance={config.tolerance:g}; the engine holds other "
        "weights or computes in another precision"
    )
    if config.action is MismatchAction.warn:
        return message
    if config.action is MismatchAction.correct:
        return f"{message}; corrected by importance weights up to {config.max_importance_weight:g}"
    raise OnPolicyError(
        f"{message}; fix that, raise the tolerance, or set on_policy.action to warn or correct"
    )
