"""Samples move from the rank that generated them to the data-parallel rank that trains on them.

Every rank generates a contiguous block of the step's samples, whatever its coordinates; each data-parallel
rank then receives the tokens of its own samples only, in the order of its micro-batches.
"""

from __future__ import annotations

from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    all_to_all_objects,
    rank_range,
)


def local_slice(parallel: Parallel, total: int) -> slice:
    """Where this rank's samples stand among all `total` samples of a step."""
    share = rank_range(total, parallel.rank, parallel.world_size)
    return slice(share.start, share.stop)


def redistribute_to_dp(
    parallel: Parallel, rollouts: Rollouts, schedule: MicroBatchPlan, total: int
) -> Rollouts:
    """Each rank's block of `total` samples in, the samples of this data-parallel rank out, as planned."""
    blocks = [rank_range(total, r, parallel.world_size) for r in range(parallel.world_size)]
    mine = blocks[parallel.rank]
    dp_ranks = all_gather_objects(parallel, parallel.dp_rank)
    send_chunks = [
        rollouts.select([i - mine.start for i in schedule.samples_of(dp_rank) if i in mine])
        for dp_rank in dp_ranks
    ]
    received = Rollouts.concatenate(all_to_all_objects(parallel, send_chunks))
    wanted = schedule.samples_of(parallel.dp_rank)
    arrived = [i for block in blocks for i in wanted if i in block]
    place = {sample: position for position, sample in enumerate(arrived)}
    return received.select([place[sample] for sample in wanted])


def gather_to_rank0(parallel: Parallel, rollouts: Rollouts) -> Rollouts | None:
    """All ranks' samples on rank 0, None elsewhere."""
    parts = all_to_all_objects(parallel, [rollouts if r == 0 else None for r in range(parallel.world_size)])
    return Rollouts.concatenate(parts) if parallel.rank == 0 else None
