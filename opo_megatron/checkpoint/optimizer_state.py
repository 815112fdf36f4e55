"""Gathers the distributed optimizer's state for a checkpoint without needless copies.

Megatron's gather allocates master weights, first and second moments four times each (shard, received
shards, their concatenation, the full state), which at 12 bytes per parameter costs more than writing them.
Here a rank that holds a whole buffer returns the optimizer's own tensors.  Where data parallelism shards a
buffer, the replica's first rank receives into one buffer and the others send their shards: 12 B per
parameter on the first rank, 12 B / ranks on the others.

Positions are those of the gradient buffer, including the padding between its buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATES = ("param", "exp_avg", "exp_avg_sq")


class Pieces:
    """The states of a buffer's parameters as separate tensors, indexed by a slice of buffer positions."""

    def __init__(self, pieces: Mapping[tuple[int, int], Tensor]) -> None:
        self._pieces = pieces

    def __getitem__(self, where: slice) -> Tensor:
        return self._pieces[where.start, where.stop]


def use_lean_gather(optimizer: Any) -> None:
    """Patch an optimizer, or each of a chain, to gather its state this way when saving."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer):
            one.get_parameter_state_dp_zero = partial(_gather_state, one)


def _gather_state(
    optimizer: DistributedOptimizer,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> dict[Any, Any] | None:
    """Replaces `DistributedOptimizer.get_parameter_state_dp_zero` for the format saved here.

    Returns:
        buffer → dtype → state name → sliceable state; None except on the first rank of a replica.
    """
    if empty_data or return_on_all_ranks or not use_gloo_comm:
        original = DistributedOptimizer.get_parameter_state_dp_zero
        result: dict[Any, Any] | None = original(optimizer, use_gloo_comm, empty_data, return_on_all_ranks)
        return result
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for i, ranges in enumerate(optimizer.gbuf_ranges):
        ((dtype, buckets),) = ranges.items()
        if optimizer.data_parallel_group_gloo.size() == 1:
            state[i] = {dtype: _own_states(optimizer, i, buckets)}
        else:
            state[i] = {dtype: _gathered_states(optimizer, i, buckets)}
    return state if optimizer.data_parallel_group_gloo.rank() == 0 else None


def _own_states(optimizer: DistributedOptimizer, i: int, buckets: list[Any]) -> dict[str, Pieces]:
    pieces: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in STATES}
    index_map = optimizer.buffers[i].param_index_map
    for bucket in buckets:
        for parameter in bucket["param_map"]:
            start, end, _ = index_map[parameter]
            own = optimizer._get_main_param_and_optimizer_states(parameter)
            for name in STATES:
                pieces[name][start, end] = own[name].detach().view(-1)
    return {name: Pieces(tensors) for name, tensors in pieces.items()}


def _gathered_states(optimizer: DistributedOptimizer, i: int, buckets: list[Any]) -> dict[str, Tensor]:
    group = optimizer.data_parallel_group_gloo
    first = torch.distributed.get_process_group_ranks(group)[0]
    sizes = [bucket.grad_data.numel() for bucket in optimizer.buffers[i].buckets]
    is_first = group.rank() == 0
    states: dict[str, Tensor] = {}
    for name in STATES:
        full = torch.empty(sum(sizes) if is_first else 0, dtype=torch.float32)
        for size, part, bucket in zip(sizes, full.split(sizes) if is_first else sizes, buckets, strict=True):
            shard = torch.zeros(size // group.size(), dtype=torch.float32)
            for parameter, ranges in bucket["param_map"].items():
                own = optimizer._get_main_param_and_optimizer_states(parameter)[name]
                shard[ranges["gbuf_local"].start : ranges["gbuf_local"].end].copy_(own.detach())
            received = list(part.chunk(group.size())) if isinstance(part, Tensor) else None
            torch.distributed.gather(shard, received, first, group)
        states[name] = full
    return states
