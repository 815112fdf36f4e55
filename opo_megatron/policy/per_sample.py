"""Inner products of the per-sample gradients ∇log π_T(y), and the samples' energies.

Either of the output layer, by one forward pass, under any parallel layout; or of all parameters, by one
backward pass per sample, keeping all gradients in host memory: for small models only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.micro_batch import MicroBatch, MicroBatchPlan
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.megatron_versions import gradients_of_norm
from opo_megatron.distributed.process_groups import all_reduce, gather_tokens
from opo_megatron.kernels.output_gram import output_gram
from opo_megatron.policy.model import head_weight
from opo_megatron.policy.token_measures import measure_tokens

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from opo_megatron.policy.policy import Policy

COLUMNS = 2**20
"""Gradient entries per matrix product in float64."""


@dataclass(frozen=True)
class TokenFactors:
    """Estimators that multiply each token's gradient by a factor of its own."""

    names: tuple[str, ...]
    from_energies: Callable[[Tensor], Tensor]
    """Energies [N] float64 of all tokens, in the order of the samples → [names, N] float64."""


NO_FACTORS = TokenFactors((), lambda energies: energies.new_empty(0, len(energies)))


@dataclass(frozen=True)
class PerSample:
    """Of n samples, float64, on the CPU of every rank."""

    gram: Tensor
    """[n, n] ⟨∇log π(y_i), ∇log π(y_j)⟩."""
    energies: EnergySums
    token_products: dict[str, Tensor]
    """[P, P] by name: inner products of the sums over each prompt's tokens, each multiplied by its factor."""


def output_layer(
    policy: Policy,
    rollouts: Rollouts,
    schedule: MicroBatchPlan,
    temperature: float,
    factors: TokenFactors = NO_FACTORS,
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
    members = _members(rollouts)
    prompts, names = len(members), factors.names
    sizes = [n * n, n, n, len(names) * prompts**2]
    sums = torch.zeros(sum(sizes), dtype=torch.float64)
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
            factors.from_energies if names else None,
        )
        weighted = (members @ result.weighted.cpu() @ members.T).flatten()
        own = (result.gram.flatten(), result.energy, result.energy_hidden)
        sums = torch.cat((*(part.cpu() for part in own), weighted))
    all_reduce(parallel, sums)
    gram, energy, energy_hidden, weighted = sums.split(sizes)
    products = dict(zip(names, weighted.view(len(names), prompts, prompts), strict=True))
    return PerSample(gram.view(n, n), EnergySums(energy, energy_hidden), products)


def _members(rollouts: Rollouts) -> Tensor:
    """[P, n] float64: 1 where the sample is the prompt's, in the order of the groups."""
    index = rollouts.groups.unique(return_inverse=True)[1]
    return torch.nn.functional.one_hot(index).double().T


def all_parameters(
    policy: Policy,
    rollouts: Rollouts,
    schedule: MicroBatchPlan,
    temperature: float,
    factors: TokenFactors = NO_FACTORS,
) -> PerSample:
    """The same with respect to every parameter; gradients are zero afterwards."""
    rollouts = replace(rollouts, advantages=torch.ones(len(rollouts), dtype=torch.float64))
    backward = _Backward(policy, temperature)
    for i in range(len(rollouts)):
        backward.add(rollouts.select([i]))
    gram = backward.products()
    products = {}
    if factors.names:
        energies = measure_tokens(policy, rollouts, schedule, temperature).energy.double()
        for name, factor in zip(factors.names, factors.from_energies(energies), strict=True):
            weighted = replace(rollouts, token_advantages=factor)
            for member in _members(rollouts):
                backward.add(weighted.select(member.nonzero()[:, 0]))
            products[name] = backward.products()
    policy.zero_gradients()
    return PerSample(gram, output_layer(policy, rollouts, schedule, temperature).energies, products)


class _Backward:
    """Gradients of all parameters, one after another, and their inner products."""

    def __init__(self, policy: Policy, temperature: float) -> None:
        self.policy = policy
        # Their sum over data-parallel replicas is ∇log π.
        self.objective = PolicyGradient(-float(policy.parallel.dp_size), temperature)
        self.optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
        self.gradients: list[list[Tensor]] = [[] for _ in self.optimizers]

    def add(self, samples: Rollouts) -> None:
        """The gradient of Σ A log π of some samples, which every replica runs."""
        policy = self.policy
        schedule = policy.schedule_replicated(samples.sequence_lengths, range(len(samples)))
        ordered = samples.select(schedule.samples_of(policy.parallel.dp_rank))
        policy.checked_gradients(ordered, schedule, self.objective)
        policy.optimizer.prepare_grads()
        for gradients, optimizer in zip(self.gradients, self.optimizers, strict=True):
            # As in Megatron's gradient norm, each gradient counts once over the optimizer's ranks.
            parts = [gradient.flatten().float() for gradient in gradients_of_norm(optimizer)]
            gradients.append(torch.cat(parts).cpu() if parts else torch.empty(0))

    def products(self) -> Tensor:
        """[n, n] inner products of the gradients added since the last call, over all ranks."""
        count = len(self.gradients[0])
        total = torch.zeros(count, count, dtype=torch.float64)
        for gradients, optimizer in zip(self.gradients, self.optimizers, strict=True):
            own = torch.zeros_like(total)
            for columns in torch.stack(gradients).split(COLUMNS, 1):
                own += columns.double() @ columns.double().T
            own = own.to(self.policy.parallel.device)
            if self.policy.parallel.world_size > 1:
                dist.all_reduce(own, group=optimizer.get_grad_stats_parallel_group())
            total += own.cpu()
            gradients.clear()
        return total
