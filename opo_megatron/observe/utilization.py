"""Model FLOPs of the training phase, and which share of the GPUs' peak they are (MFU).

A forward pass of a sequence of T + 1 tokens, the last of which is only a target, takes

    2·N·T  +  2·V·H·R  +  2·layers·heads·d·T²

operations: N counts the parameters of the layers that multiply a token (of experts, the active ones), the
head computes the R response tokens alone, and causal attention's two products fill half a square.  A
backward pass takes twice as many.  The embedding's lookup, norms and recomputation count nothing.  Samples
whose group has no signal run forward only, and objectives other than OPO's run further forward passes; both
count as what they are.

The peak is the dense one in bf16, also for policies in FP8, whose MFU may therefore exceed 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.algorithm.config import AlgorithmConfig, ObjectiveName, keeps_zero_variance
from opo_megatron.algorithm.objectives.table import passes_of
from opo_megatron.batch.stats import BatchStats
from opo_megatron.config.schema import ModelConfig
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.plan.hardware import GPUS
from opo_megatron.plan.times import active_parameters

DEVICE_NAMES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
"""Names that CUDA gives the GPUs of `plan/hardware.py`; variants with another peak have other names."""


def forward_flops(
    model: ModelConfig, vocab_size: int, context_lengths: Tensor, response_lengths: Tensor
) -> Tensor:
    """[n] float64: operations of one forward pass of each sample.

    Args:
        context_lengths: tokens that were not sampled: of the prompt, and what an environment gave.
    """
    assert model.kv_channels is not None
    head = vocab_size * model.hidden_size
    layers = active_parameters(model, vocab_size) - head
    attention = model.num_layers * model.num_attention_heads * model.kv_channels
    tokens = (context_lengths + response_lengths - 1).double()
    return 2 * (layers * tokens + head * response_lengths.double() + attention * tokens.square())


def training_passes(algorithm: AlgorithmConfig, advantages: Tensor) -> Tensor:
    """[n] float64: passes of each sample, in units of a forward pass; a backward pass is two."""
    if algorithm.objective is not ObjectiveName.policy_gradient or keeps_zero_variance(algorithm):
        # The update of every sample, and the objective's forward passes before it.
        return torch.full_like(advantages, 3.0 + sum(passes_of(algorithm)), dtype=torch.float64)
    return torch.where(advantages == 0, 1.0, 3.0).double()


def training_tflop(
    model: ModelConfig, vocab_size: int, algorithm: AlgorithmConfig, stats: BatchStats, advantages: Tensor
) -> float:
    """10¹² model operations of a step's training phase, over all samples."""
    context_lengths = stats.sequence_lengths - stats.response_lengths
    flops = forward_flops(model, vocab_size, context_lengths, stats.response_lengths)
    return float((flops * training_passes(algorithm, advantages)).sum()) / 1e12


def peak_tflops(parallel: Parallel) -> float | None:
    """Dense bf16 peak of all ranks' GPUs, 10¹² operations per second; None on a CPU and on unknown GPUs."""
    if parallel.device.type != "cuda":
        return None
    name = DEVICE_NAMES.get(torch.cuda.get_device_name(parallel.device))
    return None if name is None else parallel.world_size * GPUS[name].bf16 / 1e12
