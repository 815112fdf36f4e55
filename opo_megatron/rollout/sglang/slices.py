"""Feeding SGLang servers with slices: every rank of a node shares its own, and one posts all handles.

Per bucket, every rank that feeds engines puts their slices into shared memory, the ranks of the node exchange
the handles, and each server's sender posts one request with the handle of every engine rank.  By the exchange
a rank also learns that its node's servers have loaded the bucket before, whose memory it then frees.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from opo_megatron.config.choices import Dtype, WeightLayout
from opo_megatron.config.rules.weight_layout import expert_ranks, require_slices, why_full
from opo_megatron.config.schema import Config
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.rollout.sglang.transfer import Sender, pickled, shared_buffer, start_sharing
from opo_megatron.weights.engine_slices import EngineSizes, check_slices, expected_tensors
from opo_megatron.weights.fp8_folder import BlockFp8
from opo_megatron.weights.slice_routes import Place, SliceRoutes, routes_of
from opo_megatron.weights.slice_stream import SliceBucket, WeightStream

Handles = dict[tuple[int, int, int], str]
"""(engine, server of that engine's sender, engine rank) → handle of a bucket's slices."""


def slice_feed(
    config: Config, parallel: Parallel, owner: int, fp8: BlockFp8 | None, log: Callable[[str], None]
) -> SliceFeed | None:
    """How this rank feeds slices to servers; None where they get full tensors, which is logged with its
    reason unless it was asked for.  A collective of all ranks.

    Args:
        owner: the rank that sends weights to this rank's server.

    Raises:
        UserError: where the recipe asks for slices that are not possible.
    """
    layout, reason = config.rollout.sglang.layout, why_full(config, on_cpu=parallel.device.type == "cpu")
    if reason is None:
        place = Place(socket.gethostname(), owner, parallel.tp_rank, parallel.dp_cp_rank)
        places = all_gather_objects(parallel, place)
        engine = EngineSizes(config.rollout.sglang.tensor_parallel_size, expert_ranks(config), fp8)
        routes = routes_of(places, parallel.tp_size, engine)
        if isinstance(routes, SliceRoutes):
            return SliceFeed(config, parallel, routes, places)
        reason = routes
    if layout is WeightLayout.slices:
        require_slices(reason)
    if layout is WeightLayout.auto and parallel.rank == 0:
        log(f"every rank of an SGLang server is sent all tensors of the model: {reason}")
    return None


class SliceFeed:
    """This rank's part in feeding the servers of its node."""

    def __init__(
        self, config: Config, parallel: Parallel, routes: SliceRoutes, places: Sequence[Place]
    ) -> None:
        """A collective of all ranks."""
        self._config, self._parallel, self._routes = config, parallel, routes
        self._owner = places[parallel.rank].engine
        self._node = _node_group(parallel, places)
        self._first = start_sharing(parallel.device)
        self._checked = False
        self._held: SliceBucket = {}

    def check(self, stream: WeightStream) -> None:
        """Check, once, that every engine rank will be sent what it has.

        Raises:
            UserError: on all ranks, naming a tensor that it would not.
        """
        if self._checked:
            return
        policy, engine = self._config.policy, self._routes.engine
        dtype = torch.bfloat16 if policy.dtype is Dtype.bf16 else torch.float32
        expected = expected_tensors(policy.model, stream.vocab_size, engine, dtype)
        check_slices(stream.slices(self._routes).infos, expected)
        self._checked = True

    def send(self, stream: WeightStream, senders: Sequence[Sender[Sequence[str]]], servers: int) -> None:
        """Send all buckets; a collective of all ranks, whatever fails.

        Args:
            senders: to this rank's servers; empty on ranks that send nothing.
            servers: the number of servers of every sender.

        Raises:
            UserError: after the last bucket, for weights that are NaN or infinite, in FP8.
        """
        allocate = partial(shared_buffer, device=self._parallel.device)
        for bucket in stream.slices(self._routes, allocate):
            own = {
                (engine, server, rank): pickled(bucket[rank])
                for engine, rank in self._routes.feeds[self._parallel.rank]
                for server in range(servers)  # a handle is read once
            }
            for sender in senders:
                sender.wait()
            handles = self._exchange(own)
            self._held = bucket
            for server, sender in enumerate(senders):
                ranks = range(self._routes.engine.tensor)
                sender.send([handles[self._owner, server, rank] for rank in ranks])

    def finish(self) -> None:
        """Free the last bucket; every sender has waited until its servers had loaded it."""
        self._exchange({})
        self._held = {}

    def _exchange(self, own: Handles) -> Handles:
        """The handles of all ranks of the node."""
        if self._node is None:
            return own
        gathered: list[Any] = [None] * dist.get_world_size(self._node)
        dist.all_gather_object(gathered, own, group=self._node)
        return {key: handle for handles in gathered for key, handle in handles.items()}


def _node_group(parallel: Parallel, places: Sequence[Place]) -> Any:
    """The ranks of this rank's node, for host data; None where it is the only one."""
    if parallel.world_size == 1:
        return None
    own = None
    for node in dict.fromkeys(place.node for place in places):  # every rank takes part in making every group
        group = dist.new_group([i for i, place in enumerate(places) if place.node == node], backend="gloo")
        if node == places[parallel.rank].node:
            own = group
    return own
