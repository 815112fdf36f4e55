"""Inner products of the per-sample gradients ∇log π_T(y), and the samples' energies.

Either of the output layer, by one forward pass, under any parallel layout; or of all parameters, by one
backward pass per sample, keeping all gradients in host memory: for small models only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.micro_batch import MicroBatch, MicroBatchPlan
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import all_reduce, gather_tokens
from opo_megatron.kernels.output_gram import output_gram
from opo_megatron.policy.model import head_weight

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from opo_megatron.policy.policy import Policy

COLUMNS = 2**20
"""Gradient entries per matrix product in float64."""


@dataclass(frozen=True)
class PerSample:
    """Of n samples, float64, on the CPU of every rank."""

    gram: Tensor
    """[n, n] ⟨∇log π(y_i), ∇log π(y_j)⟩."""
    energies: EnergySums


def output_layer(
    policy: Policy, rollouts: Rollouts, schedule: MicroBatchPlan, temperature: float
) -> PerSample:
    """Gradients with respect to the output matrix, for the samples of `rollouts`, which every data-parallel
    replica holds in the order of `schedule`; blocks of the Gram matrix are split over dp × cp ranks."""
    hidden_parts: list[Tensor] = []
    target_parts: list[Tensor] = []
    index_parts: list[Tensor] = []
    matrix: list[Tensor] = []

    def collect(chunk: GPTModel, micro: MicroBatch, hidden: Tensor) -> None:
        hidden_parts.append(policy.head.select(hidden, micro))
        target_parts.append(micro.targets)
        index_parts.append(micro.token_indices)
        matrix[:] = [head_weight(chunk)]

    policy.run_forward(rollouts, schedule, collect)
    parallel, n = policy.parallel, len(rollouts)
    sums = torch.zeros(n * n + 2 * n, dtype=torch.float64)
    if matrix:
        vocabulary, rows = policy.head.vocabulary(matrix[0])
        owners = torch.repeat_interleave(torch.arange(n), rollouts.response_lengths).to(parallel.device)
        indices, tokens = torch.cat(index_parts), owners.numel()
        result = output_gram(
            gather_tokens(parallel, torch.cat(hidden_parts), indices, tokens),
            rows,
            gather_tokens(parallel, torch.cat(target_parts), indices, tokens),
            owners,
            n,
            vocabulary,
            temperature,
            policy.head.chunk_tokens,
            (parallel.dp_cp_rank, parallel.dp_cp_size),
        )
        sums = torch.cat((result.gram.flatten(), result.energy, result.energy_hidden)).cpu()
    all_reduce(parallel, sums)
    gram, energy, energy_hidden = sums.split([n * n, n, n])
    return PerSample(gram.view(n, n), EnergySums(energy, energy_hidden))


def all_parameters(
    policy: Policy, rollouts: Rollouts, schedule: MicroBatchPlan, temperature: float
) -> PerSample:
    """The same with respect to every parameter; gradients are zero afterwards."""
    objective = PolicyGradient(-float(policy.parallel.dp_size), temperature)  # their sum is ∇log π
    optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    gradients: list[list[Tensor]] = [[] for _ in optimizers]
    for i in range(len(rollouts)):
        sample = rollouts.select([i])
        sample.advantages = torch.ones(1, dtype=torch.float64)
        schedule_of_one = policy.schedule_replicated(sample.sequence_lengths, [0])
        policy.checked_gradients(sample, schedule_of_one, objective)
        policy.optimizer.prepare_grads()
        for samples, optimizer in zip(gradients, optimizers, strict=True):
            # As in Megatron's gradient norm, each gradient counts once over the optimizer's ranks.
            parts = [gradient.flatten().float() for gradient in optimizer.get_main_grads_for_grad_norm()]
            samples.append(torch.cat(parts).cpu() if parts else torch.empty(0))
    policy.zero_gradients()
    gram = torch.zeros(len(rollouts), len(rollouts), dtype=torch.float64)
    for samples, optimizer in zip(gradients, optimizers, strict=True):
        own = torch.zeros_like(gram)
        for columns in torch.stack(samples).split(COLUMNS, 1):
            own += columns.double() @ columns.double().T
        own = own.to(policy.parallel.device)
        if policy.parallel.world_size > 1:
            dist.all_reduce(own, group=optimizer.get_grad_stats_parallel_group())
        gram += own.cpu()
    return PerSample(gram, output_layer(policy, rollouts, schedule, temperature).energies)
