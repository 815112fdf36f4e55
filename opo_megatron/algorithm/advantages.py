"""One formula for advantages; every estimator is a setting of its switches.

For sample i of a scope S (the K responses of one prompt, or the whole batch), with weight wᵢ:

    b  = Σ_{j∈S} wⱼ rⱼ / Σ_{j∈S} wⱼ             baseline
    b₋ᵢ = Σ_{j≠i} wⱼ rⱼ / Σ_{j≠i} wⱼ            leave-one-out baseline
    Aᵢ = (rᵢ − b − shift) / s      s = 1, the standard deviation of the rewards in S, or their mean

    opo          w = length              the paper's baseline: minimum variance if ‖∇log π‖² ∝ length
    opo_loo      w = length, leave-one-out: unbiased
    group_mean   w = 1
    rloo         w = 1, leave-one-out
    grpo         w = 1, s = std + 1e-6
    batch_length w = length over the whole batch
    energy(_loo) w = Σ energy of the tokens (`energy.py`), a proxy of ‖∇log π‖²
    auto         w = the mixture with the least variance in earlier steps (`fitted_weights.py`),
                 leave-one-out: unbiased
    james_stein  w = 1, leave-one-out, b₋ᵢ shrunken towards other prompts (`shrinkage.py`): unbiased
    otb(_loo)    a baseline for each token (`token_baselines.py`)
    none, raft, reinforce_rej, remax, maxrl, rec, asymre, opmd, reinforce_plus_plus: `presets.py`

A baseline that includes the sample's own reward gives Aᵢ = (1 − wᵢ/W)(rᵢ − b₋ᵢ), W = Σ w: a factor
that depends on the sample, hence a bias of O(1/K) unless all weights are equal.  Leave-one-out has none.

Never NaN: a scope whose weights sum to 0 (all responses empty) uses the plain mean.  The advantage of a
sample without others to compare with (a group of one, or all other weights 0) is exactly 0, or with
`keep_lone` its reward.  It is exactly 0 in a group whose rewards are all equal, unless another switch says
otherwise (`config.py::keeps_zero_variance`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opo_megatron.algorithm.config import AlgorithmConfig, Center, Scale, Scope, Weight
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.fitted_weights import FittedWeights
from opo_megatron.algorithm.shrinkage import shrunken

STD_EPSILON = 1e-6
MEAN_EPSILON = 1e-6
TOKEN_EPSILON = 1e-8
"""Added to a variance over tokens and, as the methods' public code does, to the number of tokens."""


def baseline_weights(
    config: AlgorithmConfig,
    lengths: Tensor,
    energies: EnergySums | None = None,
    fitted: FittedWeights | None = None,
) -> Tensor:
    """[n] float64: wᵢ of each sample, from its response length (stop token included) or its energies."""
    lengths = lengths.double()
    if config.weight is Weight.length:
        return lengths
    if config.weight is Weight.length_power:
        return lengths**config.length_exponent
    if config.weight is Weight.one:
        return torch.ones_like(lengths)
    if energies is None:
        raise ValueError(f"weight {config.weight} needs energies, which were not measured")
    if config.weight is Weight.energy:
        return energies.energy
    if config.weight is Weight.energy_hidden:
        return energies.energy_hidden
    assert fitted is not None
    return fitted(lengths, energies)


GroupAdvantages = Callable[[Tensor, Tensor, Tensor, bool, "float | None"], tuple[Tensor, Tensor]]
"""`group_advantages`, or a kernel with the same result."""


def compute_advantages(
    config: AlgorithmConfig,
    rewards: Tensor,
    lengths: Tensor,
    groups: Tensor,
    energies: EnergySums | None = None,
    fitted: FittedWeights | None = None,
    device: torch.device | None = None,
    kernel: GroupAdvantages | None = None,
    greedy_rewards: Tensor | None = None,
) -> Tensor:
    """[n] float64 advantages of all samples of a batch, on the device of the rewards.

    Args:
        rewards: [n] reward of each sample.
        lengths: [n] response tokens of each sample.
        groups: [n] int64, equal for samples of the same prompt.
        energies: of each sample, required by weights that use them.
        fitted: the mixture of `weight=fitted`.
        device: where to compute; default: the device of the rewards.
        kernel: the implementation; default `group_advantages`.
        greedy_rewards: [n] reward of the greedy response to each sample's prompt, for `center=greedy`.
    """
    scope = _scope(config, groups)
    rewards = rewards.double().clamp(min=0) if config.positive_only else rewards.double()
    lone = torch.zeros_like(rewards, dtype=torch.bool)
    scales_in_kernel = config.scale is Scale.std and not config.shift and not config.keep_lone
    if config.center is Center.none:
        advantages = rewards
    elif config.center is Center.greedy:
        if greedy_rewards is None:
            raise ValueError("center=greedy needs the rewards of greedy responses, which were not sampled")
        advantages = rewards - greedy_rewards.double()
    elif config.center is Center.logmeanexp:
        advantages, lone = _logmeanexp_advantages(rewards, scope, config.tau)
    elif config.center is Center.token_mean:
        raise ValueError("center=token_mean has an advantage per token (algorithm/token_baselines.py)")
    else:
        weights = baseline_weights(config, lengths, energies, fitted)
        epsilon = STD_EPSILON if scales_in_kernel else None
        advantages = _mean_advantages(config, rewards, weights, scope, epsilon, device, kernel)
        if config.keep_lone or config.shrink:
            lone = _is_lone(weights, scope, bool(config.leave_one_out))
        if config.shrink:
            advantages = shrunken(advantages, rewards, weights, scope, lone)
            lone = torch.zeros_like(lone)  # these have the mean of other prompts
    if config.shift:
        advantages = advantages - config.shift
    if config.keep_lone:
        advantages = torch.where(lone, rewards, advantages)
    if not (scales_in_kernel and config.center is Center.mean):
        advantages = _scaled(config, advantages, rewards, lengths, scope, lone)
    if config.drop_zero_variance:
        is_zero = _all_equal(rewards, scope)
        if config.keep_lone:
            is_zero = is_zero & (torch.bincount(scope)[scope] > 1)
        advantages = torch.where(is_zero, 0.0, advantages)
    return advantages


def _mean_advantages(
    config: AlgorithmConfig,
    rewards: Tensor,
    weights: Tensor,
    scope: Tensor,
    epsilon: float | None,
    device: torch.device | None,
    kernel: GroupAdvantages | None,
) -> Tensor:
    """[n] rewards minus the weighted mean of their scope, by `kernel`."""
    order = torch.argsort(scope, stable=True)
    offsets = torch.nn.functional.pad(torch.bincount(scope).cumsum(0), (1, 0))
    device = device or rewards.device
    _, advantages = (kernel or group_advantages)(
        rewards[order].to(device),
        weights[order].to(device),
        offsets.to(device),
        bool(config.leave_one_out),
        epsilon,
    )
    result = torch.empty_like(rewards, dtype=advantages.dtype)
    return result.scatter_(0, order, advantages.to(rewards.device))


def _logmeanexp_advantages(rewards: Tensor, scope: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """[n] r − τ log mean exp(r/τ) over the scope, and whether the sample is alone in it."""
    size = torch.bincount(scope)
    highest = rewards.new_full((len(size),), float("-inf")).scatter_reduce(0, scope, rewards, "amax")[scope]
    powers = ((rewards - highest) / tau).exp()
    baselines = highest + tau * (_sum_over(powers, scope, len(size)) / size).log()[scope]
    return torch.where(_all_equal(rewards, scope), 0.0, rewards - baselines), (size == 1)[scope]


def _scaled(
    config: AlgorithmConfig,
    advantages: Tensor,
    rewards: Tensor,
    lengths: Tensor,
    scope: Tensor,
    lone: Tensor,
) -> Tensor:
    """[n] advantages divided by what `scale` says; a lone sample has nothing to divide by."""
    if config.scale is Scale.token_std:
        return _whitened(advantages, lengths.double())
    if config.scale is Scale.one_plus_tau:
        return advantages / (1 + config.tau)
    count = len(torch.bincount(scope))
    if config.scale is Scale.std:
        return torch.where(lone, advantages, advantages / (_std(rewards, scope, count)[scope] + STD_EPSILON))
    if config.scale is Scale.mean:
        means = _sum_over(rewards, scope, count) / torch.bincount(scope)
        return torch.where(lone, advantages, advantages / (means[scope] + MEAN_EPSILON))
    return advantages


def _whitened(values: Tensor, lengths: Tensor) -> Tensor:
    """[n] with mean 0 and standard deviation 1 over all tokens, where a sample has `lengths` of them."""
    tokens = lengths.sum()
    if tokens == 0:
        return torch.zeros_like(values)
    count = tokens + TOKEN_EPSILON
    centred = values - (lengths * values).sum() / count
    variance = (lengths * centred.square()).sum() / count * (tokens / (tokens - 1).clamp(min=1))
    return centred / (variance + TOKEN_EPSILON).sqrt()


def group_advantages(
    rewards: Tensor,
    weights: Tensor,
    offsets: Tensor,
    leave_one_out: bool,
    epsilon: float | None,
) -> tuple[Tensor, Tensor]:
    """Baselines [G] over all samples of a group, and advantages [n], both float64.

    Reference implementation of the Triton kernel in `kernels/triton_advantages.py`.

    Args:
        rewards: [n], group by group.
        weights: [n] wᵢ ≥ 0.
        offsets: [G + 1] int64: index of each group's first sample, then n.
        epsilon: divide by the group's standard deviation plus this; None: do not divide.
    """
    rewards, weights = rewards.double(), weights.double()
    sizes = offsets.diff()
    scope = torch.repeat_interleave(torch.arange(len(sizes), device=rewards.device), sizes)
    count = len(sizes)
    # A scope whose weights are all 0 uses equal weights.
    weights = torch.where(_sum_over(weights, scope, count)[scope] == 0, torch.ones_like(weights), weights)
    total, weighted = _sum_over(weights, scope, count), _sum_over(weights * rewards, scope, count)
    baselines = torch.where(total > 0, weighted / total, 0.0)
    own = _leave_one_out(rewards, weights, scope, total, weighted) if leave_one_out else baselines[scope]
    # Rounding must not give a gradient to a scope whose rewards are all equal.
    advantages = torch.where(_all_equal(rewards, scope), 0.0, rewards - own)
    if epsilon is not None:
        advantages = advantages / (_std(rewards, scope, count)[scope] + epsilon)
    return baselines, advantages


def _leave_one_out(
    rewards: Tensor, weights: Tensor, scope: Tensor, total: Tensor, weighted: Tensor
) -> Tensor:
    """[n]: each sample's leave-one-out baseline; its own reward where all other weights are 0."""
    # At most one sample has more than half of the total weight.  For it, total − weight would cancel:
    # the others are summed directly, which also tells a tiny sum from exactly 0.
    heavy = weights > total[scope] / 2
    others = _sum_of_others(weights, heavy, scope, total)
    others_weighted = _sum_of_others(weights * rewards, heavy, scope, weighted)
    return torch.where(others > 0, others_weighted / others, rewards)


def _sum_of_others(values: Tensor, heavy: Tensor, scope: Tensor, total: Tensor) -> Tensor:
    """[n]: Σ of the other samples' values, without cancellation for `heavy` ones."""
    light = _sum_over(values.masked_fill(heavy, 0.0), scope, len(total))[scope]
    return torch.where(heavy, light, total[scope] - values)


def _is_lone(weights: Tensor, scope: Tensor, leave_one_out: bool) -> Tensor:
    """[n] bool: whether no other sample of the scope counts in the sample's baseline."""
    size = torch.bincount(scope)
    if not leave_one_out:
        return (size == 1)[scope]
    total = _sum_over(weights, scope, len(size))
    weights = torch.where(total[scope] == 0, torch.ones_like(weights), weights)
    total = _sum_over(weights, scope, len(size))
    return _sum_of_others(weights, weights > total[scope] / 2, scope, total) <= 0


def zero_variance(config: AlgorithmConfig, rewards: Tensor, groups: Tensor) -> Tensor:
    """[n] bool: whether all rewards of the sample's scope are equal, so that it has no gradient."""
    return _all_equal(rewards.double(), _scope(config, groups))


def _scope(config: AlgorithmConfig, groups: Tensor) -> Tensor:
    """[n] int64 from 0, equal for samples that share a baseline."""
    index = torch.unique(groups, return_inverse=True)[1]
    return index if config.scope is Scope.group else torch.zeros_like(index)


def _all_equal(values: Tensor, scope: Tensor) -> Tensor:
    size = int(scope.max()) + 1 if scope.numel() else 0
    low = values.new_full((size,), float("inf")).scatter_reduce(0, scope, values, "amin")
    high = values.new_full((size,), float("-inf")).scatter_reduce(0, scope, values, "amax")
    return (low == high)[scope]


def _std(values: Tensor, scope: Tensor, count: int) -> Tensor:
    """[G]: sample standard deviation of each scope; 0 for one sample."""
    size = _sum_over(torch.ones_like(values), scope, count)
    centred = values - (_sum_over(values, scope, count) / size)[scope]
    return (_sum_over(centred**2, scope, count) / (size - 1).clamp(min=1)).sqrt()


def _sum_over(values: Tensor, scope: Tensor, count: int) -> Tensor:
    """[G]: Σ over each scope."""
    return values.new_zeros(count).scatter_add(0, scope, values)
