"""The distributed optimizer's state on its way into a checkpoint, without copies that nobody needs.

Megatron's own gathering allocates each of master weights, first and second moments four times over (shard,
received shards, their concatenation, the whole), which for 12 bytes a parameter costs more than writing
them.  Here a rank that holds all of a buffer gives the optimizer's own tensors, and where data parallelism
shards it, the first rank of the replica receives into one buffer and the others send their shard:
12 B per parameter on the first, 12 B / ranks on the others.

Positions are those of the gradient buffer, padding between its buckets included, so that no parameter is
read from its neighbour's place.
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
    """The states of a buffer's parameters, each a tensor of its own; indexed by positions in the buffer."""

    def __init__(self, pieces: Mapping[tuple[int, int], Tensor]) -> None:
        self._pieces = pieces

    def __getitem__(self, where: slice) -> Tensor:
        return self._pieces[where.start, where.stop]


def gather_leanly(optimizer: Any) -> None:
    """Make an optimizer, or each of a chain, give its state this way when it is saved."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer):
            one.get_parameter_state_dp_zero = partial(_state_on_first, one)


def _state_on_first(
    optimizer: DistributedOptimizer,
    use_gloo_comm: bool = True,
    empty_data: bool = False,
    return_on_all_ranks: bool = False,
) -> dict[Any, Any] | None:
    """Instead of `DistributedOptimizer.get_parameter_state_dp_zero`, for the form that is saved here.

    Returns:
        buffer → data type → state's name → what can be sliced; None but on the first rank of a replica.
    """
    if empty_data or return_on_all_ranks or not use_gloo_comm:
        original = DistributedOptimizer.get_parameter_state_dp_zero
        found: dict[Any, Any] | None = original(optimizer, use_gloo_comm, empty_data, return_on_all_ranks)
        return found
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
    places = optimizer.buffers[i].param_index_map
    for bucket in buckets:
        for parameter in bucket["param_map"]:
            start, end, _ = places[parameter]
            held = optimizer._get_main_param_and_optimizer_states(parameter)
            for name in STATES:
                pieces[name][start, end] = held[name].detach().view(-1)
    return {name: Pieces(found) for name, found in pieces.items()}


def _gathered_states(optimizer: DistributedOptimizer, i: int, buckets: list[Any]) -> dict[str, Tensor]:
    group = optimizer.data_parallel_group_gloo
    first = torch.distributed.get_process_group_ranks(group)[0]
    sizes = [bucket.grad_data.numel() for bucket in optimizer.buffers[i].buckets]
    is_first = group.rank() == 0
    states: dict[str, Tensor] = {}
    for name in STATES:
        whole = torch.empty(sum(sizes) if is_first else 0, dtype=torch.float32)
        for size, part, bucket in zip(sizes, whole.split(sizes) if is_first else sizes, buckets, strict=True):
            shard = torch.zeros(size // group.size(), dtype=torch.float32)
            for parameter, place in bucket["param_map"].items():
                held = optimizer._get_main_param_and_optimizer_states(parameter)[name]
                shard[place["gbuf_local"].start : place["gbuf_local"].end].copy_(held.detach())
            received = list(part.chunk(group.size())) if isinstance(part, Tensor) else None
            torch.distributed.gather(shard, received, first, group)
        states[name] = whole
    return states
