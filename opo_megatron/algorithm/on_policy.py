"""Was this batch drawn by the current weights?  Refused where it is not proven.

Two proofs, every step.  The version of every token must be the policy's.  And the policy's own
log-probabilities of the sampled tokens, which fall out of the training pass, must agree with what
the engine recorded while it sampled: Δ = log π_policy − log π_engine, over all tokens.

Where an engine cannot be made to agree, `on_policy.action=correct` weights every token by
min(exp(Δ), cap), the truncated importance weights of (Ionides 2008), instead of refusing.
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
"""Sizes of |Δ| at which tokens are counted: how the mismatch is spread."""


@dataclass(frozen=True)
class Mismatch:
    """Engine against policy over all tokens of a step."""

    max: float
    mean: float
    k3: float
    ess: float = 1.0
    """Effective sample size (Σw)² / Σw², w = exp(Δ), as a share of the tokens."""
    above: tuple[float, ...] = ()
    """Share of tokens with |Δ| above each of `HISTOGRAM`."""


class MismatchSums:
    """Sums over tokens, micro-batch by micro-batch; additive over ranks but for `highest`."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(4 + len(HISTOGRAM), dtype=torch.float64, device=device)
        self.highest = torch.zeros((), dtype=torch.float64, device=device)
        self.edges = torch.tensor(HISTOGRAM, dtype=torch.float64, device=device)

    def add(self, delta: Tensor) -> None:
        """Δ = log π_policy − log π_engine of some tokens [n]."""
        delta = delta.double()
        size, weight = delta.abs(), delta.exp()
        sums = torch.stack((size.sum(), k3(delta).sum(), weight.sum(), weight.square().sum()))
        # The number above an edge is what `bucketize` puts behind it.
        place = torch.bucketize(size, self.edges)
        above = torch.bincount(place, minlength=len(HISTOGRAM) + 1).flip(0).cumsum(0).flip(0)[1:]
        self.values += torch.cat((sums, above.double()))
        torch.maximum(self.highest, size.max(), out=self.highest)

    def add_partial(self, partial: Tensor) -> None:
        """The same from parts that a kernel has summed already.

        Args:
            partial: [4 + len(HISTOGRAM) + 1, parts] float64, the rows as in `values`, then the largest |Δ|.
        """
        self.values += partial[:-1].sum(1)
        torch.maximum(self.highest, partial[-1].max(), out=self.highest)

    @staticmethod
    def result(values: list[float], highest: float, tokens: float) -> Mismatch:
        """The measures from sums over all ranks."""
        size, divergence, weight, squares, *above = values
        ess = weight**2 / squares / tokens if squares > 0 else math.nan
        shares = tuple(count / tokens for count in above)
        return Mismatch(highest, size / tokens, divergence / tokens, ess, shares)


def check_versions(weight_versions: Tensor | None, expected: int) -> None:
    """Refuse a batch in which any token was drawn by other weights than version `expected`.

    Raises:
        OnPolicyError: naming how many tokens came from which versions.
    """
    if weight_versions is None:
        raise OnPolicyError("the engine reported no weight versions, so the rollouts cannot be trained on")
    wrong = weight_versions[weight_versions != expected]
    if wrong.numel() > 0:
        counts = ", ".join(f"{n} of version {v}" for v, n in sorted(Counter(wrong.tolist()).items()))
        raise OnPolicyError(
            f"the policy is at weight version {expected} but {wrong.numel()} of {weight_versions.numel()} "
            f"sampled tokens are not ({counts}); send the weights before generating"
        )


def check_mismatch(config: OnPolicyConfig, mismatch: Mismatch) -> str | None:
    """Refuse a step whose largest |Δ| exceeds the tolerance; returns the warning where only that is asked.

    Raises:
        OnPolicyError: with action=refuse, before any optimizer step.
    """
    if not all(math.isfinite(value) for value in (mismatch.max, mismatch.mean, mismatch.k3)):
        raise OnPolicyError(
            f"engine and policy cannot be compared (mean difference {mismatch.mean} of log-probabilities), "
            "because weights or logits are not finite; resume from a checkpoint with a smaller optimizer.lr"
        )
    if mismatch.max <= config.tolerance:
        return None
    sentence = (
        f"engine and policy disagree by {mismatch.max:.3g} in a token's log-probability (mean "
        f"{mismatch.mean:.3g}), more than on_policy.tolerance={config.tolerance:g}; the engine holds other "
        "weights or computes in another precision"
    )
    if config.action is MismatchAction.warn:
        return sentence
    if config.action is MismatchAction.correct:
        return f"{sentence}; corrected by importance weights up to {config.max_importance_weight:g}"
    raise OnPolicyError(
        f"{sentence}; mend that, or raise the tolerance, or set on_policy.action to warn or correct"
    )
