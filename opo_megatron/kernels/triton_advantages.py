"""Baseline and advantages of every group in one launch (Triton).

The reference implementation, with the formula, is `algorithm/advantages.py::group_advantages`.  One
program per group.  Sums are float64, as in the reference: a group has few samples, so the launch
dominates.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Samples per block of a program; a typical group is one block."""


@triton.jit
def _statistics(rewards, weights, begin, end, BLOCK: tl.constexpr):
    """Statistics of one group: whether all weights are 0, W, Σ wr, both sums without a sample of w > W/2,
    whether all rewards are equal, and their sample standard deviation."""
    lanes = tl.arange(0, BLOCK)
    total, plain = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(begin, end, BLOCK):
        index = start + lanes
        inside = index < end
        r = tl.load(rewards + index, mask=inside, other=0.0).to(tl.float64)
        total += tl.load(weights + index, mask=inside, other=0.0).to(tl.float64)
        plain += r
        low = tl.minimum(low, tl.where(inside, r, float("inf")))
        high = tl.maximum(high, tl.where(inside, r, float("-inf")))
    count = (end - begin).to(tl.float64)
    mean = tl.sum(plain, 0) / tl.maximum(count, 1.0)
    all_zero = tl.sum(total, 0) == 0
    total_weight = tl.where(all_zero, count, tl.sum(total, 0))
    weighted, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    light, light_weighted = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        index = start + lanes
        inside = index < end
        r = tl.load(rewards + index, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(weights + index, mask=inside, other=0.0).to(tl.float64)
        w = tl.where(all_zero, tl.where(inside, 1.0, 0.0), w)
        is_light = w <= total_weight / 2
        weighted += w * r
        light += tl.where(is_light, w, 0.0)
        light_weighted += tl.where(is_light, w * r, 0.0)
        squares += tl.where(inside, (r - mean) * (r - mean), 0.0)
    deviation = tl.sqrt(tl.sum(squares, 0) / tl.maximum(count - 1, 1.0))
    all_equal = tl.min(low, 0) == tl.max(high, 0)
    return (
        all_zero, total_weight, tl.sum(weighted, 0), tl.sum(light, 0), tl.sum(light_weighted, 0), all_equal,
        deviation,
    )  # fmt: skip


@triton.jit
def _advantage(
    r, w, all_zero, total_weight, weighted, light, light_weighted, all_equal, deviation, epsilon,
    LEAVE_ONE_OUT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Advantages of samples with rewards r and weights w, from the statistics of their group."""
    w = tl.where(all_zero, 1.0, w)
    if LEAVE_ONE_OUT:
        heavy = w > total_weight / 2
        others = tl.where(heavy, light, total_weight - w)
        others_weighted = tl.where(heavy, light_weighted, weighted - w * r)
        baseline = tl.where(others > 0, others_weighted / tl.where(others > 0, others, 1.0), r)
    else:
        baseline = weighted / total_weight
    advantage = tl.where(all_equal, 0.0, r - baseline)
    if SCALE:
        advantage = advantage / (deviation + epsilon)
    return advantage


@triton.jit
def _kernel(
    rewards, weights, offsets, baselines, advantages, epsilon,
    LEAVE_ONE_OUT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    begin, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    all_zero, total_weight, weighted, light, light_weighted, all_equal, deviation = _statistics(
        rewards, weights, begin, end, BLOCK
    )
    tl.store(baselines + group, weighted / tl.where(total_weight > 0, total_weight, 1.0))
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < end
        r = tl.load(rewards + index, mask=inside, other=0.0).to(tl.float64)
        w = tl.load(weights + index, mask=inside, other=0.0).to(tl.float64)
        advantage = _advantage(
            r, w, all_zero, total_weight, weighted, light, light_weighted, all_equal, deviation, epsilon,
            LEAVE_ONE_OUT, SCALE,
        )  # fmt: skip
        tl.store(advantages + index, advantage, mask=inside)


def group_advantages(
    rewards: Tensor, weights: Tensor, offsets: Tensor, leave_one_out: bool, epsilon: float | None
) -> tuple[Tensor, Tensor]:
    """`algorithm/advantages.py::group_advantages` on a GPU, in one launch."""
    groups = offsets.numel() - 1
    baselines = rewards.new_empty(groups, dtype=torch.float64)
    advantages = rewards.new_empty(rewards.numel(), dtype=torch.float64)
    if groups:
        _kernel[(groups,)](
            rewards, weights, offsets, baselines, advantages, 0.0 if epsilon is None else epsilon,
            LEAVE_ONE_OUT=leave_one_out, SCALE=epsilon is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return baselines, advantages
