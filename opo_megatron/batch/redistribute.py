"""Redistribution of samples from the ranks that generated them to the data-parallel ranks that train on them.

Every rank generates a contiguous block of the step's samples, whatever its coordinates; a data-parallel
rank receives only its own samples, in the order of its micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    all_to_all_objects,
    rank_range,
)


def local_slice(parallel: Parallel, total: int) -> slice:
    """This rank's slice of the `total` samples of a step."""
    own = rank_range(total, parallel.rank, parallel.world_size)
    return slice(own.start, own.stop)


def redistribute_to_dp(
    parallel: Parallel, rollouts: Rollouts, schedule: MicroBatchPlan, total: int
) -> Rollouts:
    """Exchange the ranks' blocks of `total` samples; returns the scheduled samples of this rank's replica."""
    blocks = [rank_range(total, r, parallel.world_size) for r in range(parallel.world_size)]
    return send_to_dp(parallel, rollouts, schedule, blocks)


def send_to_dp(
    parallel: Parallel, rollouts: Rollouts, schedule: MicroBatchPlan, held: Sequence[Sequence[int]]
) -> Rollouts:
    """Exchange samples that any rank may have; returns the scheduled samples of this rank's replica.

    Args:
        held: by rank, the numbers of the samples that it has, in their order; `rollouts` are this rank's.
    """
    position = {sample: i for i, sample in enumerate(held[parallel.rank])}
    dp_ranks = all_gather_objects(parallel, parallel.dp_rank)
    chunks = {  # the ranks of a replica get the same
        dp_rank: rollouts.select([position[i] for i in schedule.samples_of(dp_rank) if i in position])
        for dp_rank in set(dp_ranks)
    }
    received = Rollouts.concatenate(all_to_all_objects(parallel, [chunks[dp_rank] for dp_rank in dp_ranks]))
    scheduled = schedule.samples_of(parallel.dp_rank)
    is_of = [set(of_rank) for of_rank in held]
    arrived = [i for of_rank in is_of for i in scheduled if i in of_rank]
    index = {sample: position for position, sample in enumerate(arrived)}
    return received.select([index[sample] for sample in scheduled])


def exchange_blocks(
    parallel: Parallel, rollouts: Rollouts, held: list[list[int]], samples: list[int]
) -> Rollouts:
    """Divide `samples` over the ranks in contiguous blocks, in their order.

    Args:
        held: by rank, the numbers of the samples that it has, in their order; `rollouts` are this rank's.
        samples: numbers of the samples that are kept.
    """
    position = {sample: i for i, sample in enumerate(held[parallel.rank])}
    blocks = [rank_range(len(samples), r, parallel.world_size) for r in range(parallel.world_size)]
    wanted = [samples[block.start : block.stop] for block in blocks]
    send_chunks = [rollouts.select([position[i] for i in one if i in position]) for one in wanted]
    received = Rollouts.concatenate(all_to_all_objects(parallel, send_chunks))
    own = set(wanted[parallel.rank])
    arrived = [i for of_rank in held for i in of_rank if i in own]
    index = {sample: i for i, sample in enumerate(arrived)}
    return received.select([index[sample] for sample in wanted[parallel.rank]])


def gather_to_rank0(parallel: Parallel, rollouts: Rollouts) -> Rollouts | None:
    """All samples on rank 0, None elsewhere."""
    parts = all_to_all_objects(parallel, [rollouts if r == 0 else None for r in range(parallel.world_size)])
    return Rollouts.concatenate(parts) if parallel.rank == 0 else None


def scatter_from_rank0(parallel: Parallel, rollouts: Rollouts | None) -> Rollouts:
    """This rank's contiguous block of the samples that rank 0 has."""
    blocks: list[Rollouts | None] = [None] * parallel.world_size
    if parallel.rank == 0:
        assert rollouts is not None
        blocks = [
            rollouts.select(rank_range(len(rollouts), rank, parallel.world_size))
            for rank in range(parallel.world_size)
        ]
    own: Rollouts = all_to_all_objects(parallel, blocks)[0]
    return own
