"""Advantages of replayed responses, which of them are replayed, and the factor of their loss.

RePO (arXiv 2506.09340; SihengLi99/RePO, `_compute_loss` of `replay_grpo_trainer.py`, `adv_norm_mode=split`).
A step's loss is the on-policy part plus λ times the part of R earlier responses to each of its prompts,

    A_i = (r_i − mean) / (std + 1e-4)   over the R, std with R − 1,
    L = −(1/N) Σ min(ρ A, clip(ρ, 1 − ε_l, 1 + ε_h) A),   ρ = π / π_sampler,

each part divided by its own number of tokens.  Left out: its normalization over a prompt's new and replayed
responses together (`mixed`), which changes the on-policy part, and its mean over sequences of token means.

SPEAR (arXiv 2509.22601, `TrajectoryBufferBatch` of TencentYoutuResearch/SPEAR `ray_trainer_hybrid.py`, the
replay of `dp_actor.py`).  Responses with A > 0 are kept.  Once there are 1.5 times `size` whose reward is
above the median of the last groups' mean rewards,

    A_i = (r_i − median of means) [ / (median of stds + 1e-6) ]

is computed anew, those with A_i > 0 stay, and a random subset of them, the largest power of two up to `size`,
is trained on by the same clipped loss times λ (1 − cos(π s / S)) / 2 until step S, then λ.  The buffer is
empty then.  Left out: its intrinsic tool rewards and its covariance-based clipping (`clip_cov`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

REPO_EPS = 1e-4
SPEAR_EPS = 1e-6


def repo_advantages(rewards: Tensor) -> Tensor:
    """[P, R] of the R replayed responses to each prompt."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + REPO_EPS)


def spear_advantages(rewards: Tensor, means: Sequence[float], deviations: Sequence[float] | None) -> Tensor:
    """[n], against the groups of the history.

    Args:
        means: rewards' means of these groups.
        deviations: their population deviations; None does not divide.
    """
    advantages = rewards - median(means)
    return advantages if deviations is None else advantages / (median(deviations) + SPEAR_EPS)


def median(values: Sequence[float]) -> float:
    """Of an even number, the mean of the middle two."""
    return float(torch.tensor(list(values), dtype=torch.float64).quantile(0.5))


def ramp(step: int, steps: int) -> float:
    """(1 − cos(π step / steps)) / 2 until `steps`, then 1."""
    return 1.0 if step >= steps else (1 - math.cos(math.pi * step / steps)) / 2


def power_of_two_up_to(count: int) -> int:
    """The largest power of two of at most `count`; 0 for at most 1, as published."""
    return 0 if count <= 1 else 1 << (count.bit_length() - 1)


def highest(rewards: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` highest rewards; of equal ones, the oldest."""
    return sorted(range(len(rewards)), key=lambda i: (-rewards[i], i))[:count]


def of_most_variance(rewards: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` rewards of largest variance, of equally large ones those of largest sum.

    Such a subset consists of the lowest and the highest values, so there are count + 1 candidates.
    """
    order = sorted(range(len(rewards)), key=lambda i: (rewards[i], i))
    subsets = [(order[:low], order[len(order) - (count - low) :]) for low in range(count + 1)]

    def score(subset: list[int]) -> tuple[float, float]:
        values = torch.tensor([rewards[i] for i in subset], dtype=torch.float64)
        return round(float(values.var(correction=0)), 12), float(values.sum())

    best = max((low + high for low, high in subsets), key=score)
    return sorted(best)
