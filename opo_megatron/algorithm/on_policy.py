"""Was this batch drawn by the current weights?  Refused where it is not proven.

Two proofs, every step.  The version of every token must be the policy's.  And the policy's own
log-probabilities of the sampled tokens, which fall out of the training pass, must agree with what
the engine recorded while it sampled: Δ = log π_policy − log π_engine, over all tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from opo_megatron.config.schema import MismatchAction, OnPolicyConfig
from opo_megatron.errors import OnPolicyError


def k3(delta: Tensor) -> Tensor:
    """exp(Δ) − 1 − Δ ≥ 0 per token: its mean over the engine's samples estimates KL(engine ‖ policy)."""
    return torch.expm1(delta) - delta


@dataclass(frozen=True)
class Mismatch:
    """Engine against policy over all tokens of a step."""

    max: float
    mean: float
    k3: float


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
    raise OnPolicyError(f"{sentence}; mend that, or raise the tolerance, or set on_policy.action=warn")
