"""Megatron's `torch_dist` format, written by torch's own classes.

`dist_checkpointing.save` prepares and checks a sharded state and hands it to a strategy.  This one turns it
into the state that `torch.distributed.checkpoint` writes, and hands that on: Megatron's writers are not used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistSaveShardedStrategy,
    mcore_to_pyt_state_dict,
)

BACKEND, VERSION = "torch_dist", 1

Handle = Callable[[dict[str, Any], Path], None]
"""Takes torch's state and the folder."""


def save_with(handle: Handle, state: dict[str, Any], folder: Path) -> None:
    """Let Megatron prepare a sharded state, and `handle` write it; a collective of all ranks."""
    dist_checkpointing.save(state, str(folder), _Strategy(handle))


class _Strategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """A subclass of the default strategy: since 0.19 Megatron silently replaces any other."""

    def __init__(self, handle: Handle) -> None:
        super().__init__(BACKEND, VERSION)
        self._handle = handle

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        self._handle(_torch_state(sharded_state_dict), Path(checkpoint_dir))


def _torch_state(sharded_state: Any) -> dict[str, Any]:
    """The shards that this rank writes, by their key in the checkpoint: one replica of each."""
    shards: dict[str, list[ShardedBase]] = defaultdict(list)
    for shard in nested_values(sharded_state):
        if is_main_replica(shard.replica_id):
            shards[shard.key if isinstance(shard, ShardedTensor) else shard.unique_key].append(shard)
    state: dict[str, Any] = mcore_to_pyt_state_dict(shards)
    return state
