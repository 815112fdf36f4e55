"""The plan of the weight sync: the tensors of each bucket, and the bytes over each link.

The policy's weight stream runs for a rank, as full tensors or as slices, whichever the run would send, and
its collectives are recorded as torch dispatches them.  A rank receives from its predecessor in the group:
(g − 1)/g of the result of an all-gather over g ranks, all of a broadcast's; of an all-to-all, each part from
its sender.  Bytes count as NVLink where sender and receiver are in one node, else as network.  Ranks are
assumed to fill nodes in order, and engines the ranks of a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opo_megatron.config.choices import EngineName
from opo_megatron.config.rules.weight_layout import expert_ranks, why_full
from opo_megatron.config.schema import Config
from opo_megatron.policy.policy import Policy
from opo_megatron.weights.engine_slices import EngineSizes, expected_tensors
from opo_megatron.weights.fp8_folder import engine_quantization
from opo_megatron.weights.param_mapping import Shape, hf_shapes
from opo_megatron.weights.slice_routes import Place, SliceRoutes, routes_of


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
    """(name, shape) of every tensor, per bucket: Hugging Face's, or an engine rank's; none on a rank that
    receives no slices."""
    bucket_bytes: tuple[int, ...]
    traffic: tuple[Traffic, ...]
    """Per bucket."""
    expected: dict[str, Shape] = field(repr=False)
    """Name → shape of all tensors that an engine, or one of its ranks, needs."""
    why_full: str | None = None
    """Why engines are sent full tensors; None where each of their ranks is sent its own slices."""

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
        elif name == "alltoall_base_":
            group, sizes = args[2:4]
            for sender, size in zip(_ranks(group), sizes, strict=True):
                if sender != dist.get_rank():
                    self._receive(size * args[0].element_size(), sender)
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


def slice_routes(config: Config, vocab_size: int, ranks: int, gpus_per_node: int) -> SliceRoutes | str:
    """Which slices each rank would receive, or why engines are sent full tensors."""
    settings, policy = config.rollout.sglang, config.policy
    if config.rollout.engine is not EngineName.sglang:
        return "the local engine has no ranks"
    if (reason := why_full(config, on_cpu=False)) is not None:
        return reason
    tp_size = policy.tensor_model_parallel_size
    on_node = min(gpus_per_node, ranks)
    servers = settings.servers or max(1, on_node // settings.tensor_parallel_size)
    sharing = max(1, on_node // servers)
    of_stage = ranks // policy.pipeline_model_parallel_size
    places = [
        Place(
            node=str(rank // on_node),
            engine=0 if settings.urls else rank - rank % on_node % sharing,
            tp_rank=rank % tp_size,
            replica=rank % of_stage // tp_size,
        )
        for rank in range(ranks)
    ]
    engine = EngineSizes(
        settings.tensor_parallel_size, expert_ranks(config), engine_quantization(config, vocab_size)
    )
    return routes_of(places, tp_size, engine)


def rank_stream(policy: Policy, gpus_per_node: int, config: Config) -> RankStream:
    """Run a policy's weight stream on meta tensors; every bucket arrives on every rank that wants it."""
    rank, vocab_size = policy.parallel.rank, policy.vocab_size
    found = slice_routes(config, vocab_size, policy.parallel.world_size, gpus_per_node)
    reason, routes = (found, None) if isinstance(found, str) else (None, found)
    names: list[tuple[tuple[str, Shape], ...]] = []
    sizes: list[int] = []
    traffic: list[Traffic] = []
    with torch.no_grad(), _Recorder(gpus_per_node) as recorder:
        for bucket in _buckets(policy, routes):
            first = next(iter(bucket), [])  # the same for every engine rank
            names.append(tuple((name, tuple(tensor.shape)) for name, tensor in first))
            sizes.append(sum(_bytes(tensor) for one in bucket for _, tensor in one))
            traffic.append(recorder.traffic)
            recorder.traffic = Traffic()
    if routes is None:
        expected = hf_shapes(policy.config.model, vocab_size)
    else:
        dtype = next(policy.chunks[0].parameters()).dtype
        infos = expected_tensors(policy.config.model, vocab_size, routes.engine, dtype)
        expected = {info.name: info.shape for info in infos} if routes.wanted[rank] else {}
    return RankStream(rank, tuple(names), tuple(sizes), tuple(traffic), expected, reason)


def _buckets(policy: Policy, routes: SliceRoutes | None) -> Iterator[list[list[tuple[str, Tensor]]]]:
    """Per bucket the full tensors, or those of each engine rank that the policy's rank receives for."""
    if routes is None:
        yield from ([bucket] for bucket in policy.stream_weights())
    else:
        yield from (list(bucket.values()) for bucket in policy.stream_weights().slices(routes))


def check_cover(stream: RankStream) -> int:
    """The number of tensors of the stream.

    Raises:
        ValueError: unless it has each of them exactly once, with the right shape.
    """
    expected = stream.expected
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
    """The sync of all ranks, whose buckets hold the same tensors, or none."""

    tensors: int
    bucket_bytes: tuple[int, ...]
    received: tuple[Traffic, ...] = field(repr=False)
    """By rank."""
    slowest: tuple[tuple[float, float], ...] = field(repr=False)
    """Per bucket, the largest number of bytes that a rank receives over (NVLink, network)."""
    why_full: str | None = None
    """As of all its streams."""

    @property
    def total(self) -> int:
        return sum(self.bucket_bytes)


def combine(streams: Sequence[RankStream], tensors: int) -> SyncPlan:
    """Combine the streams of all ranks.

    Raises:
        ValueError: where a rank's buckets differ from those of the first that feeds an engine.
    """
    feeding = [stream for stream in streams if stream.expected]
    for stream in feeding:
        if stream.buckets != feeding[0].buckets:
            raise ValueError(f"the buckets of rank {stream.rank} differ from those of rank {feeding[0].rank}")
    columns = list(zip(*(stream.traffic for stream in streams), strict=True))
    slowest = tuple((max(t.nvlink for t in column), max(t.network for t in column)) for column in columns)
    received = tuple(stream.received for stream in streams)
    bucket_bytes = tuple(map(max, zip(*(stream.bucket_bytes for stream in feeding), strict=True)))
    return SyncPlan(tensors, bucket_bytes, received, slowest, streams[0].why_full)
