"""The plan of the weight sync: the tensors of each bucket, and the bytes over each link.

The policy's weight stream runs for a rank, and its collectives are recorded as torch dispatches them.  A
rank receives from its predecessor in the group: (g − 1)/g of the result of an all-gather over g ranks, all
of a broadcast's.  Bytes count as NVLink where sender and receiver are in one node, else as network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opo_megatron.policy.policy import Policy
from opo_megatron.weights.param_mapping import Shape, hf_shapes


@dataclass
class Traffic:
    """Bytes that one rank receives."""

    nvlink: int = 0
    network: int = 0


@dataclass(frozen=True)
class RankStream:
    """The weight stream as one rank sees it."""

    rank: int
    buckets: tuple[tuple[tuple[str, Shape], ...], ...]
    """(Hugging Face name, shape) of every tensor, per bucket."""
    bucket_bytes: tuple[int, ...]
    traffic: tuple[Traffic, ...]
    """Per bucket."""

    @property
    def received(self) -> Traffic:
        return Traffic(sum(t.nvlink for t in self.traffic), sum(t.network for t in self.traffic))


class _Recorder(TorchDispatchMode):
    """Counts the bytes that this rank receives in collectives."""

    def __init__(self, gpus_per_node: int) -> None:
        super().__init__()
        self.gpus_per_node = gpus_per_node
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._record(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "_allgather_base_":
            result, _, group = args[:3]
            ranks = _ranks(group)
            self._receive(_bytes(result) * (len(ranks) - 1) // len(ranks), _before(ranks))
        elif name == "broadcast_":
            tensors, group, root = args[:3]
            ranks = _ranks(group)
            # A ring that starts at the root: each rank forwards what it received.
            ordered = [*ranks[root:], *ranks[:root]]
            if dist.get_rank() != ordered[0]:
                self._receive(sum(map(_bytes, tensors)), _before(ordered))
        else:
            raise NotImplementedError(f"the plan of the weight sync does not support the collective {name}")

    def _receive(self, size: int, sender: int) -> None:
        if dist.get_rank() // self.gpus_per_node == sender // self.gpus_per_node:
            self.traffic.nvlink += size
        else:
            self.traffic.network += size


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))


def _before(ranks: Sequence[int]) -> int:
    return ranks[ranks.index(dist.get_rank()) - 1]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def rank_stream(policy: Policy, gpus_per_node: int) -> RankStream:
    """Run a policy's weight stream on meta tensors; every bucket arrives on every rank."""
    names: list[tuple[tuple[str, Shape], ...]] = []
    sizes: list[int] = []
    traffic: list[Traffic] = []
    with torch.no_grad(), _Recorder(gpus_per_node) as recorder:
        for bucket in policy.stream_weights():
            names.append(tuple((name, tuple(tensor.shape)) for name, tensor in bucket))
            sizes.append(sum(_bytes(tensor) for _, tensor in bucket))
            traffic.append(recorder.traffic)
            recorder.traffic = Traffic()
    return RankStream(policy.parallel.rank, tuple(names), tuple(sizes), tuple(traffic))


def check_cover(stream: RankStream, policy: Policy) -> int:
    """The number of Hugging Face tensors of the stream.

    Raises:
        ValueError: unless it has each tensor of the model exactly once, with the right shape.
    """
    expected = hf_shapes(policy.config.model, policy.vocab_size)
    received: dict[str, Shape] = {}
    for bucket in stream.buckets:
        for name, shape in bucket:
            if name in received:
                raise ValueError(f"rank {stream.rank} receives {name} twice")
            received[name] = shape
    for name in expected.keys() | received.keys():
        if expected.get(name) != received.get(name):
            raise ValueError(
                f"rank {stream.rank} receives {name} as {received.get(name)}, not {expected.get(name)}"
            )
    return len(received)


@dataclass(frozen=True)
class SyncPlan:
    """The sync of all ranks, whose buckets are the same."""

    tensors: int
    bucket_bytes: tuple[int, ...]
    received: tuple[Traffic, ...] = field(repr=False)
    """By rank."""
    slowest: tuple[tuple[float, float], ...] = field(repr=False)
    """Per bucket, the largest number of bytes that a rank receives over (NVLink, network)."""

    @property
    def total(self) -> int:
        return sum(self.bucket_bytes)


def combine(streams: Sequence[RankStream], tensors: int) -> SyncPlan:
    """Combine the streams of all ranks.

    Raises:
        ValueError: where a rank's buckets differ from the first rank's.
    """
    for stream in streams:
        if stream.buckets != streams[0].buckets:
            raise ValueError(f"the buckets of rank {stream.rank} differ from those of rank {streams[0].rank}")
    columns = list(zip(*(stream.traffic for stream in streams), strict=True))
    slowest = tuple((max(t.nvlink for t in column), max(t.network for t in column)) for column in columns)
    received = tuple(stream.received for stream in streams)
    return SyncPlan(tensors, streams[0].bucket_bytes, received, slowest)
