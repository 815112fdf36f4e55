"""The weight stream as slices: every rank receives only what it feeds to engines.

Bucket by bucket, the ranks of the owning pipeline stage cut their shards; where a slice needs shards of
several ranks (`Cut.joins`) or experts of others, they exchange exactly these parts by one all-to-all.  The
slices are put into one buffer, quantized where the engine is, and broadcast to the ranks of the other stages
that have the same shards.  As in `stream.py`, the order of buckets follows from the mapping alone, and no
branch depends on a tensor's value.

Which rank receives which slices is in `SliceRoutes.wanted`; it is the same for all ranks of a pipeline group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.errors import UserError
from opo_megatron.kernels.fp8 import quantize_blocks
from opo_megatron.weights.buffers import bytes_of, views_of
from opo_megatron.weights.engine_slices import (
    EngineTensor,
    PolicySizes,
    engine_tensors,
    shape_of,
    slice_infos,
)
from opo_megatron.weights.param_mapping import Parameter
from opo_megatron.weights.safetensors_file import TensorInfo
from opo_megatron.weights.slice_routes import SliceRoutes
from opo_megatron.weights.stream import Bucket, Receivers, Shards, shard_shape, stream_weights

SliceBucket = dict[int, list[tuple[str, Tensor]]]
"""Engine rank → (its name, slice), all views of one buffer; empty on a rank that feeds none."""
Allocate = Callable[[int], Tensor]
"""Bytes → a new buffer of them, uint8."""


class SliceStream:
    """Yields buckets of slices; a collective: all ranks must consume every bucket."""

    def __init__(
        self,
        shards: Shards,
        mapping: Sequence[Parameter],
        parallel: Parallel,
        bucket_bytes: int,
        routes: SliceRoutes,
        allocate: Allocate | None = None,
    ) -> None:
        """Args:
        allocate: where slices are put; default: new memory of this rank's device.
        """
        self._shards, self._parallel, self._limit, self._routes = shards, parallel, bucket_bytes, routes
        self._allocate = allocate or self._new_memory
        self._policy = PolicySizes(parallel.tp_size, parallel.etp_size, parallel.ep_size)
        self._tensors = engine_tensors(mapping)
        self._shapes = {one.name: self._shard_shape(one) for one in self._tensors}
        self._infos = {one.name: self._infos_of(one) for one in self._tensors}
        self._own = routes.wanted[parallel.rank]

    def _new_memory(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._parallel.device)

    def _shard_shape(self, tensor: EngineTensor) -> torch.Size:
        size = self._policy.expert_tensor if tensor.is_expert else self._policy.tensor
        return shard_shape(tensor.parameters[0], size)

    def _infos_of(self, tensor: EngineTensor) -> tuple[TensorInfo, ...]:
        dtype = self._shards.dtype(tensor.parameters[0])
        return slice_infos(tensor, self._shapes[tensor.name], dtype, self._policy, self._routes.engine)

    @property
    def infos(self) -> list[TensorInfo]:
        """What every rank of an engine is sent, in order."""
        return [info for infos in self._infos.values() for info in infos]

    def __iter__(self) -> Iterator[SliceBucket]:
        """
        Raises:
            UserError: after the last bucket, for weights that are NaN or infinite, in FP8.
        """
        failure: UserError | None = None
        for bucket in self._buckets():
            buffer, views = self._new_bucket(bucket)
            if self._parallel.pp_rank == bucket[0].stage:
                try:
                    self._fill(bucket, views)
                except UserError as error:
                    failure = failure or error  # the other ranks are inside the next collective
            if self._parallel.pp_size > 1 and self._own:
                owner = dist.get_global_rank(self._parallel.pp_group, bucket[0].stage)
                dist.broadcast(buffer, owner, group=self._parallel.pp_group)
            yield views
        if failure is not None:
            raise failure

    def _buckets(self) -> Iterator[list[EngineTensor]]:
        """Consecutive tensors of one stage and type, up to the limit of bytes on the fullest rank, or one
        larger tensor."""
        copies = max(map(len, self._routes.wanted))
        bucket: list[EngineTensor] = []
        size, kind = 0, None
        for tensor in self._tensors:
            this_kind = (tensor.stage, self._shards.dtype(tensor.parameters[0]))
            this_size = copies * bytes_of(self._infos[tensor.name])
            if bucket and (this_kind != kind or size + this_size > self._limit):
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size, kind = size + this_size, this_kind
        if bucket:
            yield bucket

    def _new_bucket(self, bucket: list[EngineTensor]) -> tuple[Tensor, SliceBucket]:
        """A buffer for this rank's slices, and its views."""
        infos = [info for tensor in bucket for info in self._infos[tensor.name]]
        if not self._own:
            return torch.empty(0), {}
        every = infos * len(self._own)
        buffer = self._allocate(bytes_of(every))
        views = iter(views_of(buffer, every))
        return buffer, {rank: [(info.name, next(views)) for info in infos] for rank in self._own}

    def _fill(self, bucket: list[EngineTensor], views: SliceBucket) -> None:
        """Cut, exchange and write the slices of this rank.

        Raises:
            UserError: for weights without an FP8 scale, once all are written.
        """
        pieces: _Pieces = {}
        for exchanged, group in groupby(sorted(bucket, key=self._exchange), key=self._exchange):
            tensors = list(group)
            pieces |= self._exchanged(tensors) if exchanged else self._cut_here(tensors)
        failure: UserError | None = None
        for rank in self._own:
            outputs = (view for _, view in views[rank])
            for tensor in bucket:
                own = [next(outputs) for _ in self._infos[tensor.name]]
                try:
                    self._write(tensor, rank, pieces, *own)
                except UserError as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def _exchange(self, tensor: EngineTensor) -> int:
        """0 where no ranks exchange parts of their shards, 1 where those of the tensor-parallel group do, 2
        of the experts' group."""
        return (1 + tensor.is_expert) * tensor.exchanges(self._policy, self._routes.engine)

    # ------------------------------------------------------------------ pieces

    def _cut_here(self, bucket: list[EngineTensor]) -> _Pieces:
        """Views of this rank's own shards."""
        pieces: _Pieces = {}
        for tensor in bucket:
            cut, own = tensor.cut(self._policy, self._routes.engine), 0
            for j, parameter in enumerate(tensor.parameters):
                shard = self._shards.read(parameter)
                for rank in self._own:
                    part = tensor.part(rank, self._routes.engine)
                    pieces[tensor.name, rank, own, j] = cut.piece(shard, part)
        return pieces

    def _exchanged(self, bucket: list[EngineTensor]) -> _Pieces:
        """The pieces of all ranks that this rank's slices are made of, by one all-to-all."""
        group = self._parallel.expert_group if bucket[0].is_expert else self._parallel.tp_group
        members = dist.get_process_group_ranks(group)
        source = members.index(self._parallel.rank)
        dtype = self._shards.dtype(bucket[0].parameters[0])
        shards = {tensor.name: [self._shards.read(p) for p in tensor.parameters] for tensor in bucket}
        sent: list[list[Tensor]] = []
        for member in members:
            rows = [
                row
                for tensor, rank, j in self._owed(bucket, source, self._routes.wanted[member])
                for row in self._piece(tensor, rank, shards[tensor.name][j])
            ]
            sent.append([row.reshape(-1) for row in rows])
        empty = torch.empty(0, dtype=dtype, device=self._parallel.device)
        flat = torch.cat([empty, *(row for rows in sent for row in rows)])
        keys, sizes, shapes = [], [], []
        for i in range(len(members)):
            owed = list(self._owed(bucket, i, self._own))
            of_source = [self._piece_shape(tensor, rank) for tensor, rank, _ in owed]
            keys += [(tensor.name, rank, i, j) for tensor, rank, j in owed]
            shapes += of_source
            sizes.append(sum(map(math.prod, of_source)))
        received = empty.new_empty(sum(sizes))
        dist.all_to_all_single(
            received.view(torch.uint8),
            flat.view(torch.uint8),
            [size * dtype.itemsize for size in sizes],
            [sum(row.numel() for row in rows) * dtype.itemsize for rows in sent],
            group=group,
        )
        parts = received.split([math.prod(shape) for shape in shapes])
        return {key: [part.view(shape)] for key, part, shape in zip(keys, parts, shapes, strict=True)}

    def _owed(
        self, bucket: list[EngineTensor], source: int, ranks: Sequence[int]
    ) -> Iterator[tuple[EngineTensor, int, int]]:
        """(tensor, engine rank, index of the parameter) of the pieces that a member of the group sends to
        one that feeds `ranks`, in order."""
        for rank in ranks:
            for tensor in bucket:
                sources = tensor.cut(self._policy, self._routes.engine).sources(
                    tensor.part(rank, self._routes.engine)
                )
                if not tensor.is_expert:
                    if sources is None or source in sources:
                        yield tensor, rank, 0
                    continue
                expert_rank, expert_tensor_rank = divmod(source, self._policy.expert_tensor)
                assert sources is not None
                own, count = tensor.own_experts(rank, self._routes.engine), len(tensor.parameters)
                for j in range(count):
                    if expert_rank * count + j in own and expert_tensor_rank in sources:
                        yield tensor, rank, j

    def _piece(self, tensor: EngineTensor, rank: int, shard: Tensor) -> list[Tensor]:
        cut = tensor.cut(self._policy, self._routes.engine)
        return cut.piece(shard, tensor.part(rank, self._routes.engine))

    def _piece_shape(self, tensor: EngineTensor, rank: int) -> tuple[int, ...]:
        return shape_of(self._piece(tensor, rank, torch.empty(self._shapes[tensor.name], device="meta")))

    # ------------------------------------------------------------------ slices

    def _write(
        self, tensor: EngineTensor, rank: int, pieces: _Pieces, values: Tensor, scales: Tensor | None = None
    ) -> None:
        """Put one slice into its views of the buffer; with scales in FP8."""
        fp8, dtype = self._routes.engine.fp8, self._shards.dtype(tensor.parameters[0])
        output = values if scales is None else torch.empty_like(values, dtype=dtype)
        for i, one in enumerate(output.unbind(0) if tensor.is_expert else [output]):
            rows = self._rows(tensor, rank, i, pieces)
            for target, part in zip(one.split([part.shape[0] for part in rows]), rows, strict=True):
                target.copy_(part)
        if scales is None or output.is_meta:
            return
        assert fp8 is not None
        # Experts are whole blocks, one below the other.
        quantized, scale = quantize_blocks(tensor.name, output.view(-1, output.shape[-1]), fp8.scales)
        values.copy_(quantized.view(values.shape))
        scales.copy_(scale.view(scales.shape))

    def _rows(self, tensor: EngineTensor, rank: int, i: int, pieces: _Pieces) -> list[Tensor]:
        """The slice of a tensor, or of the i-th of the engine rank's experts."""
        engine = self._routes.engine
        cut, part = tensor.cut(self._policy, engine), tensor.part(rank, engine)
        if not self._exchange(tensor):
            return cut.rows([pieces[tensor.name, rank, 0, i]], part)
        sources = cut.sources(part) or range(1)
        if not tensor.is_expert:
            return cut.rows([pieces[tensor.name, rank, source, 0] for source in sources], part)
        expert_rank, j = divmod(tensor.own_experts(rank, engine)[i], len(tensor.parameters))
        first = expert_rank * self._policy.expert_tensor
        return cut.rows([pieces[tensor.name, rank, first + source, j] for source in sources], part)


_Pieces = dict[tuple[str, int, int, int], list[Tensor]]
"""(engine's tensor, engine rank, member of the group, parameter of the tensor) → rows."""


class WeightStream:
    """The policy's weights: buckets of full Hugging Face tensors, or of slices."""

    def __init__(
        self,
        shards: Shards,
        mapping: Sequence[Parameter],
        parallel: Parallel,
        bucket_bytes: int,
        to: Receivers = "all",
    ) -> None:
        self._source = shards, mapping, parallel, bucket_bytes
        self._to = to

    def __iter__(self) -> Iterator[Bucket]:
        return stream_weights(*self._source, self._to)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._source[1][0].tensors[0][0][1][0]

    def slices(self, routes: SliceRoutes, allocate: Allocate | None = None) -> SliceStream:
        return SliceStream(*self._source, routes, allocate)
