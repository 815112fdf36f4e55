"""Advantages by one formula; every estimator is a setting of its switches.

For sample i of a scope S (the K responses of one prompt, or the whole batch), with weight wᵢ:

    b  = Σ_{j∈S} wⱼ rⱼ / Σ_{j∈S} wⱼ             baseline
    b₋ᵢ = Σ_{j≠i} wⱼ rⱼ / Σ_{j≠i} wⱼ            the same, leave-one-out
    Aᵢ = (rᵢ − b) / s        s = 1, or the sample standard deviation of the rewards in S

    opo          w = length              the paper's baseline: least variance where ‖∇log π‖² ∝ length
    opo_loo      w = length, leave-one-out: unbiased
    group_mean   w = 1
    rloo         w = 1, leave-one-out
    grpo         w = 1, s = std + 1e-6
    batch_length w = length over the whole batch

With its own reward in the baseline, Aᵢ = (1 − wᵢ/W)(rᵢ − b₋ᵢ): a factor that depends on the
sample, hence a bias of O(1/K) unless all weights agree.  Leave-one-out has none.

Defined, never NaN: a scope whose weights sum to 0 (all responses empty) takes the plain mean; a
sample that has nothing to be left out against (a group of one, or all other weights 0) has
advantage 0, and so has a group whose rewards all agree, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.config.schema import AlgorithmConfig, Scale, Scope, Weight

STD_EPSILON = 1e-6


def baseline_weights(config: AlgorithmConfig, lengths: Tensor) -> Tensor:
    """[n] float64: wᵢ of each sample from its response length (stop token included)."""
    lengths = lengths.double()
    if config.weight is Weight.length:
        return lengths
    if config.weight is Weight.length_power:
        return lengths**config.length_exponent
    if config.weight is Weight.one:
        return torch.ones_like(lengths)
    raise ValueError(f"weight {config.weight} needs sums that were not measured")


def advantages(config: AlgorithmConfig, rewards: Tensor, lengths: Tensor, groups: Tensor) -> Tensor:
    """[n] float64 advantages of all samples of a batch.

    Args:
        rewards: [n] reward of each sample.
        lengths: [n] response tokens of each sample.
        groups: [n] int64, which samples share a prompt.
    """
    rewards = rewards.double()
    weights = baseline_weights(config, lengths)
    scope = _scope(config, groups)
    centred = rewards - _baseline(rewards, weights, scope, leave_one_out=bool(config.leave_one_out))
    # Rounding must not give a gradient to a scope whose rewards all agree.
    centred = torch.where(_agrees(rewards, scope), torch.zeros_like(centred), centred)
    if config.scale is Scale.std:
        centred = centred / (_std(rewards, scope) + STD_EPSILON)
    return centred


def _baseline(rewards: Tensor, weights: Tensor, scope: Tensor, leave_one_out: bool) -> Tensor:
    total = _sum_over(weights, scope)
    # A scope without any weight is a scope of equals.
    weights = torch.where(total == 0, torch.ones_like(weights), weights)
    total = _sum_over(weights, scope)
    weighted = _sum_over(weights * rewards, scope)
    if not leave_one_out:
        return weighted / total
    # At most one sample carries more than half of the weight.  A difference would lose the digits of
    # what the others carry, and would not tell nearly nothing from exactly nothing.
    heavy = weights > total / 2
    others = torch.where(heavy, _sum_over(weights.masked_fill(heavy, 0.0), scope), total - weights)
    values = weights * rewards
    others_weighted = torch.where(heavy, _sum_over(values.masked_fill(heavy, 0.0), scope), weighted - values)
    return torch.where(others > 0, others_weighted / others, rewards)


def without_signal(config: AlgorithmConfig, rewards: Tensor, groups: Tensor) -> Tensor:
    """[n] bool: whether all rewards of the sample's scope agree, so that it has no gradient."""
    return _agrees(rewards.double(), _scope(config, groups))


def _scope(config: AlgorithmConfig, groups: Tensor) -> Tensor:
    """[n] int64 from 0: which samples share a baseline."""
    index = torch.unique(groups, return_inverse=True)[1]
    return index if config.scope is Scope.group else torch.zeros_like(index)


def _agrees(values: Tensor, scope: Tensor) -> Tensor:
    size = int(scope.max()) + 1 if scope.numel() else 0
    low = values.new_full((size,), float("inf")).scatter_reduce(0, scope, values, "amin")
    high = values.new_full((size,), float("-inf")).scatter_reduce(0, scope, values, "amax")
    return (low == high)[scope]


def _std(values: Tensor, scope: Tensor) -> Tensor:
    count = _sum_over(torch.ones_like(values), scope)
    centred = values - _sum_over(values, scope) / count
    return (_sum_over(centred**2, scope) / (count - 1).clamp(min=1)).sqrt()


def _sum_over(values: Tensor, scope: Tensor) -> Tensor:
    """Σ over each sample's scope, spread back to the samples."""
    size = int(scope.max()) + 1 if scope.numel() else 0
    return values.new_zeros(size).scatter_add(0, scope, values)[scope]
