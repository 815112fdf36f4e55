"""The weight sync as a plan: which tensors travel in which bucket, over which links, how many bytes.

The policy's own stream is run for a rank, and its collectives are recorded as torch dispatches them.  A
rank receives from the one before it in the group: an all-gather over g ranks brings (g − 1)/g of its
result, a broadcast or a receive all of it.  Bytes count as NVLink's where sender and receiver are in one
node, else as the network's.
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
    """One rank's view of the stream."""

    rank: int
    buckets: tuple[tuple[tuple[str, Shape], ...], ...]
    """(Hugging Face name, shape) of every tensor, bucket by bucket."""
    bucket_bytes: tuple[int, ...]
    traffic: tuple[Traffic, ...]
    """What arrives for each bucket."""

    @property
    def received(self) -> Traffic:
        return Traffic(sum(t.nvlink for t in self.traffic), sum(t.network for t in self.traffic))


class _Recorder(TorchDispatchMode):
    """Counts what collectives bring to this rank."""

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
            # Each rank hands on what it got, in the order of the group beginning at the root.
            ordered = [*ranks[root:], *ranks[:root]]
            if dist.get_rank() != ordered[0]:
                self._receive(sum(map(_bytes, tensors)), _before(ordered))
        else:
            raise NotImplementedError(f"the plan of a sync does not know the collective {name}")

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
    """Run the stream of a policy on meta tensors; every bucket arrives on every rank."""
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
        ValueError: unless each tensor of the model is in it exactly once, in its own shape.
    """
    expected = hf_shapes(policy.config.model, policy.vocab_size)
    found: dict[str, Shape] = {}
    for bucket in stream.buckets:
        for name, shape in bucket:
            if name in found:
                raise ValueError(f"rank {stream.rank} gets {name} twice")
            found[name] = shape
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"rank {stream.rank} gets {name} with shape {found.get(name)}, not {expected.get(name)}"
            )
    return len(found)


@dataclass(frozen=True)
class SyncPlan:
    """The sync of all ranks, which must agree on the buckets."""

    tensors: int
    bucket_bytes: tuple[int, ...]
    received: tuple[Traffic, ...] = field(repr=False)
    """By rank."""
    slowest: tuple[tuple[float, float], ...] = field(repr=False)
    """Per bucket, the most bytes that a rank receives over (NVLink, network)."""

    @property
    def total(self) -> int:
        return sum(self.bucket_bytes)


def combine(streams: Sequence[RankStream], tensors: int) -> SyncPlan:
    """One plan of the streams of all ranks.

    Raises:
        ValueError: where a rank has other buckets than the first.
    """
    for stream in streams:
        if stream.buckets != streams[0].buckets:
            raise ValueError(f"rank {stream.rank} has other buckets than rank {streams[0].rank}")
    columns = list(zip(*(stream.traffic for stream in streams), strict=True))
    slowest = tuple((max(t.nvlink for t in column), max(t.network for t in column)) for column in columns)
    received = tuple(stream.received for stream in streams)
    return SyncPlan(tensors, streams[0].bucket_bytes, received, slowest)
