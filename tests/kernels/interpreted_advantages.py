"""Triton's interpreter against the torch reference; run by test_kernels.py, which sets TRITON_INTERPRET=1.

Triton reads the variable at import, hence the separate process.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import STD_EPSILON, group_advantages
from opo_megatron.kernels import triton_advantages as kernels
from tests.support.kernel_probes import Counted, poison_new_memory


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(kernels._kernel)
    monkeypatch.setattr(kernels, "_kernel", counted)
    return counted


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of 1 to 64 samples with empty responses; one group is all empty, one has zero variance."""
    rng = random.Random(seed)
    sizes = [1, 64, 7, 4, rng.randint(1, 64)]
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    lengths = torch.tensor([rng.choice([0, rng.randint(0, 40)]) for _ in range(sum(sizes))])
    lengths[65:72] = 0
    rewards = torch.tensor([rng.choice([0.0, 1.0, rng.uniform(-3, 3)]) for _ in range(sum(sizes))])
    rewards[72:76] = 0.7
    return rewards.double(), lengths, offsets


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("epsilon", [None, STD_EPSILON])
@pytest.mark.parametrize("seed", [0])
def test_group_advantages_equal_float64(
    kernel: Counted,
    monkeypatch: pytest.MonkeyPatch,
    leave_one_out: bool,
    epsilon: float | None,
    seed: int,
) -> None:
    rewards, lengths, offsets = batch(seed)
    expected = group_advantages(rewards, lengths, offsets, leave_one_out, epsilon)
    poison_new_memory(monkeypatch)
    result = kernels.group_advantages(rewards, lengths, offsets, leave_one_out, epsilon)
    assert kernel.launches == 1
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (result[1][72:76] == 0).all()


def test_group_advantages_in_single_precision(kernel: Counted) -> None:
    rewards, lengths, offsets = batch(3)
    _, expected = group_advantages(rewards.float(), lengths, offsets, False, None)
    _, result = kernels.group_advantages(rewards.float(), lengths.float(), offsets, False, None)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
