"""Advantages on this rank's device: one Triton launch on a GPU, the reference implementation elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron import kernels
from opo_megatron.algorithm import advantages as reference
from opo_megatron.algorithm.config import AlgorithmConfig
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.fitted_weights import FittedWeights


def compute_advantages(
    config: AlgorithmConfig,
    rewards: Tensor,
    lengths: Tensor,
    groups: Tensor,
    device: torch.device,
    energies: EnergySums | None = None,
    fitted: FittedWeights | None = None,
    greedy_rewards: Tensor | None = None,
) -> Tensor:
    """`algorithm/advantages.py::compute_advantages`, computed on `device`."""
    kernel = reference.group_advantages
    if kernels.uses_triton(device):
        from opo_megatron.kernels.triton_advantages import group_advantages as kernel
    return reference.compute_advantages(
        config, rewards, lengths, groups, energies, fitted, device, kernel, greedy_rewards
    )
