"""Forward-only passes of the policy over rollouts: log-probability and energy of every sampled token.

No gradient is computed, and the head stores no logits.  A pass is needed only for what the engine does not
return: old and reference log-probabilities, and energies with an engine that has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums, energy, sums_over
from opo_megatron.batch.micro_batch import MicroBatch, MicroBatchPlan
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.distributed.process_groups import all_reduce, gather_tokens
from opo_megatron.policy.lm_head import log_probs
from opo_megatron.policy.model import head_weight

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from opo_megatron.policy.policy import Policy


@dataclass(frozen=True)
class TokenMeasures:
    """Per response token of a data-parallel replica's rollouts, [Σl] float32 on the CPU."""

    log_prob: Tensor
    """log π_T."""
    energy: Tensor
    """e = ‖onehot − π_T‖²."""
    energy_hidden: Tensor
    """e·‖h‖²."""


def measure_energies(
    policy: Policy, rollouts: Rollouts, schedule: MicroBatchPlan, total: int, temperature: float
) -> EnergySums:
    """Energies of all `total` samples of a step, on every rank, from this replica's samples."""
    measured = measure_tokens(policy, rollouts, schedule, temperature)
    sums = torch.zeros(2, total, dtype=torch.float64)
    if policy.parallel.is_dp_leader:
        indices = torch.tensor(schedule.samples_of(policy.parallel.dp_rank), dtype=torch.int64)
        sums[0, indices] = sums_over(measured.energy, rollouts.response_lengths)
        sums[1, indices] = sums_over(measured.energy_hidden, rollouts.response_lengths)
    return EnergySums(*all_reduce(policy.parallel, sums))


def measure_token_energies(
    policy: Policy,
    rollouts: Rollouts,
    schedule: MicroBatchPlan,
    stats: BatchStats,
    temperature: float,
    max_importance_weight: float | None = None,
) -> Tensor:
    """[Σl] energies of all tokens of a step, on every rank, from this replica's samples.

    Args:
        max_importance_weight: multiply by the square of min(π / π_engine, this); None: do not multiply.
    """
    measured = measure_tokens(policy, rollouts, schedule, temperature)
    values = measured.energy
    if max_importance_weight is not None:
        assert rollouts.engine_log_prob is not None
        ratio = (measured.log_prob - rollouts.engine_log_prob).exp()
        values = values * ratio.clamp(max=max_importance_weight).square()
    return of_all_tokens(policy, values, rollouts, schedule, stats.response_lengths)


def of_all_tokens(
    policy: Policy, values: Tensor, rollouts: Rollouts, schedule: MicroBatchPlan, lengths: Tensor
) -> Tensor:
    """[Σl] values of all tokens of a step, on every rank, in the order of the step's samples.

    Args:
        values: of the tokens of this replica's samples `rollouts`, ordered as in `schedule`.
        lengths: of the responses of all samples.
    """
    total = torch.zeros(int(lengths.sum()))
    if policy.parallel.is_dp_leader:
        starts = (lengths.cumsum(0) - lengths).tolist()
        parts = values.split(rollouts.response_lengths.tolist())
        for sample, part in zip(schedule.samples_of(policy.parallel.dp_rank), parts, strict=True):
            total[starts[sample] : starts[sample] + len(part)] = part
    return all_reduce(policy.parallel, total)


def measure_tokens(
    policy: Policy, rollouts: Rollouts, schedule: MicroBatchPlan, temperature: float
) -> TokenMeasures:
    """One pass over `rollouts`, ordered as in `schedule`; every rank of the replica returns the result."""
    parts: list[Tensor] = []
    token_indices: list[Tensor] = []

    def collect(chunk: GPTModel, micro: MicroBatch, hidden: Tensor) -> None:
        output = log_probs(policy.head, hidden, head_weight(chunk), micro, temperature)
        energies = energy(output.log_prob, output.sum_squares)
        squares = policy.head.select(hidden, micro).float().square().sum(1)
        parts.append(torch.stack((output.log_prob, energies, energies * squares), 1))
        token_indices.append(micro.token_indices)

    policy.run_forward(rollouts, schedule, collect)
    tokens = int(rollouts.response_lengths.sum())
    parallel = policy.parallel
    measures = torch.empty(tokens, 3, device=parallel.device)
    if parts:
        measures = gather_tokens(parallel, torch.cat(parts), torch.cat(token_indices), tokens)
    if parallel.pp_size > 1:
        last = dist.get_global_rank(parallel.pp_group, parallel.pp_size - 1)
        dist.broadcast(measures, last, group=parallel.pp_group)
    return TokenMeasures(*measures.T.contiguous().cpu())
