"""Rollouts that later steps train on: part of a checkpoint, so that a resumed run trains on the same ones.

In memory every rank has its part of each batch, in a file the samples of all ranks: a run may resume on
another number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from opo_megatron.batch.redistribute import gather_to_rank0, scatter_from_rank0
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects

BUFFER = "replay_buffer.safetensors"
WAITING = "waiting_"
"""Name prefix of the files of batches that wait, in their order."""


@dataclass
class KeptRollouts:
    """This rank's part."""

    waiting: list[Rollouts] = field(default_factory=list)
    """Batches with advantages, the one of the next step first (`rollout.staleness`)."""
    buffer: Rollouts | None = None
    """On rank 0, all that may be replayed (`rollout.replay`)."""

    def gathered(self, parallel: Parallel) -> dict[str, Rollouts | None]:
        """File name → the samples of all ranks, on rank 0; a collective."""
        found = {
            f"{WAITING}{index:04d}.safetensors": gather_to_rank0(parallel, batch)
            for index, batch in enumerate(self.waiting)
        }
        return found if self.buffer is None else found | {BUFFER: self.buffer}


def read_kept(parallel: Parallel, checkpoint: Path) -> KeptRollouts:
    """This rank's part of what a checkpoint keeps; a collective."""
    paths = sorted(checkpoint.glob(f"{WAITING}*.safetensors")) if parallel.rank == 0 else []
    count = all_gather_objects(parallel, len(paths))[0]
    batches = (Rollouts.load(paths[i]) if parallel.rank == 0 else None for i in range(count))
    waiting = [scatter_from_rank0(parallel, batch) for batch in batches]
    has_buffer = parallel.rank == 0 and (checkpoint / BUFFER).exists()
    return KeptRollouts(waiting, Rollouts.load(checkpoint / BUFFER) if has_buffer else None)
