"""Columns that an objective computes of whole responses, or of the whole mini-batch, before a gradient.

A data-parallel replica has whole responses, so sums over a response take no communication.  What is chosen by
all tokens of the mini-batch is computed by every rank from all of them, in the order of the samples: the
result does not depend on the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.algorithm.objectives.table import ObjectiveSpec, Scope
from opo_megatron.algorithm.objectives.tokens import Derives, SampleTokens
from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.policy.policy import token_column


def derived_columns(
    parallel: Parallel,
    spec: ObjectiveSpec,
    objective: Derives,
    part: Rollouts,
    schedule: MicroBatchPlan,
    stats: BatchStats,
    samples: list[int],
) -> dict[str, Tensor]:
    """The derived columns [Σl] of this replica's tokens.

    Args:
        part: this replica's samples of the mini-batch, in the order of `schedule`.
        samples: all samples of the mini-batch, ascending.
    """
    own = torch.tensor(schedule.samples_of(parallel.dp_rank), dtype=torch.int64)
    inputs = [name for name in spec.derived_from if name != "rewards"]
    columns = [token_column(part, name).double() for name in inputs]
    values = torch.stack(columns) if columns else torch.empty(0, int(part.response_lengths.sum()))
    if spec.derived_over is not Scope.batch:
        return _derive(objective, inputs, values, part.response_lengths, own, stats)
    everywhere = torch.tensor(samples)
    lengths = stats.response_lengths[everywhere]
    positions = _positions(everywhere, lengths, own, part.response_lengths)
    total = torch.zeros(len(values), int(lengths.sum()), dtype=torch.float64)
    if parallel.is_dp_leader:
        total[:, positions] = values
    found = _derive(objective, inputs, all_reduce(parallel, total), lengths, everywhere, stats)
    return {name: column[positions] for name, column in found.items()}


def _derive(
    objective: Derives, inputs: list[str], values: Tensor, lengths: Tensor, samples: Tensor, stats: BatchStats
) -> dict[str, Tensor]:
    columns = dict(zip(inputs, values, strict=True))
    return objective.derive(SampleTokens(columns, lengths, samples, stats.rewards.double(), stats.groups))


def _positions(samples: Tensor, lengths: Tensor, own: Tensor, own_lengths: Tensor) -> Tensor:
    """[Σl] int64: the index of each token of `own` among the tokens of all `samples`, which are ascending."""
    starts = (lengths.cumsum(0) - lengths)[torch.searchsorted(samples, own)]
    first = own_lengths.cumsum(0) - own_lengths
    within = torch.arange(int(own_lengths.sum())) - torch.repeat_interleave(first, own_lengths)
    return torch.repeat_interleave(starts, own_lengths) + within
