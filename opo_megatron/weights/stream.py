"""The weight stream: full Hugging Face tensors, gathered bucket by bucket; and loading shards from them.

The bucket order follows from the parameter mapping alone, so it is the same on every rank.  Per bucket the
owning pipeline stage gathers its shards over tensor-parallel (or expert) ranks and sends the result to the
other stages (`to="all"`) or to rank 0 (`to="rank0"`); then full tensors are joined from the shards.  A rank
holds at most one bucket besides its own shards.  No branch depends on a tensor's value, so the same code
runs on meta tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.weights.param_mapping import Parameter
from opo_megatron.weights.sharding import Sliceable

Bucket = list[tuple[str, Tensor]]
"""(Hugging Face name, full tensor)."""
NamedTensors = Iterable[Bucket]
"""A weight stream, bucket by bucket."""
WeightSource = Callable[[str], Sliceable]
"""Hugging Face name → full tensor, in memory or in a file."""
Receivers = Literal["all", "rank0"]


class Shards(Protocol):
    """Source of this rank's shards: a model or a checkpoint."""

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type of any parameter of the mapping; the same on every rank."""
        ...

    def read(self, parameter: Parameter) -> Tensor:
        """This rank's shard of a parameter of its stage."""
        ...


class ModelShards:
    """Shards of the chunks of a model."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [dict(chunk.named_parameters()) for chunk in chunks]
        self._dtype = next(chunks[0].parameters()).dtype

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._dtype

    def read(self, parameter: Parameter) -> Tensor:
        return self._parameters[parameter.chunk][parameter.mcore_name].detach()


def stream_weights(
    shards: Shards,
    mapping: Sequence[Parameter],
    parallel: Parallel,
    bucket_bytes: int,
    to: Receivers = "all",
) -> Iterator[Bucket]:
    """Yield buckets of full tensors; a collective: all ranks must consume every bucket.

    With `to="rank0"` buckets are empty on all other ranks.  A tensor may share the model's memory: do not
    write to it; it is valid until the next optimizer step.
    """
    for bucket in buckets(mapping, bucket_bytes, shards.dtype):
        yield _gather(bucket, shards, parallel, to)


def buckets(
    mapping: Sequence[Parameter], limit: int, dtype: Callable[[Parameter], torch.dtype]
) -> Iterator[list[Parameter]]:
    """Consecutive parameters of one stage, kind and dtype, up to `limit` bytes or one larger parameter."""
    bucket: list[Parameter] = []
    size, kind = 0, None
    for parameter in mapping:
        if parameter.tied_duplicate:
            continue
        this_kind = (parameter.stage, parameter.is_expert, dtype(parameter))
        this_size = parameter.numel * this_kind[2].itemsize
        if bucket and (this_kind != kind or size + this_size > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size, kind = size + this_size, this_kind
    if bucket:
        yield bucket


def _gather(bucket: list[Parameter], shards: Shards, parallel: Parallel, to: Receivers) -> Bucket:
    groups = [(parallel.tp_size, parallel.tp_group)]
    if bucket[0].is_expert:
        groups = [(parallel.etp_size, parallel.etp_group), (parallel.ep_size, parallel.ep_group)]
    tp_size, shard_count = groups[0][0], math.prod(size for size, _ in groups)
    if shard_count == parallel.pp_size == 1 and (to == "all" or parallel.rank == 0):
        return [named for parameter in bucket for named in _join(parameter, [shards.read(parameter)], 1)]
    shapes = [shard_shape(parameter, tp_size) for parameter in bucket]
    sizes = [math.prod(shape) for shape in shapes]
    flat = _gather_shards(bucket, shards, parallel, to, groups, (shard_count, sum(sizes)))
    if flat is None:
        return []
    named = []
    for parameter, shape, columns in zip(bucket, shapes, flat.split(sizes, 1), strict=True):
        named.extend(_join(parameter, [column.reshape(shape) for column in columns], tp_size))
    return named


def _join(parameter: Parameter, shards: list[Tensor], tp_size: int) -> Bucket:
    """Full tensors of a parameter from the shards of all ranks, tensor-parallel ranks innermost."""
    named: Bucket = []
    for rank, tensors in enumerate(parameter.tensors):
        joined = parameter.sharding.join(shards[rank * tp_size : (rank + 1) * tp_size])
        named.extend((name, full) for (name, _), full in zip(tensors, joined, strict=True))
    return named


def _gather_shards(
    bucket: list[Parameter],
    shards: Shards,
    parallel: Parallel,
    to: Receivers,
    groups: list[tuple[int, Any]],
    shape: tuple[int, int],
) -> Tensor | None:
    """The shards of all ranks, one row per rank; None on a rank that does not receive them."""
    stage, is_expert = bucket[0].stage, bucket[0].is_expert
    is_owner = parallel.pp_rank == stage
    # Data-parallel replicas are equal: rank 0 receives from its own replica.
    if to == "rank0" and (parallel.edp_rank if is_expert else parallel.dp_cp_rank) > 0:
        return None
    flat = torch.empty(shape if not is_owner else 0, dtype=shards.dtype(bucket[0]), device=parallel.device)
    if is_owner:
        flat = torch.cat([shards.read(parameter).reshape(-1) for parameter in bucket]).unsqueeze(0)
        for size, group in groups:
            gathered = _gather_rows(flat, size, group, to)
            if gathered is None:
                return None
            flat = gathered
    elif to == "rank0" and any(dist.get_rank(group) > 0 for _, group in groups):
        return None
    if parallel.pp_size == 1:
        return flat
    return _send_to_stages(flat, stage, parallel, to)


def _gather_rows(flat: Tensor, size: int, group: Any, to: Receivers) -> Tensor | None:
    """[rows, n] of each rank → [size · rows, n], in rank order; with `to="rank0"` only on the first."""
    if size == 1:
        return flat
    flat = flat.contiguous()
    if to == "all":
        gathered = flat.new_empty(size * flat.shape[0], flat.shape[1])
        dist.all_gather_into_tensor(gathered, flat, group=group)
        return gathered
    first = dist.get_global_rank(group, 0)
    if dist.get_rank(group) > 0:
        dist.gather(flat, None, dst=first, group=group)
        return None
    gathered = flat.new_empty(size * flat.shape[0], flat.shape[1])
    dist.gather(flat, list(gathered.chunk(size)), dst=first, group=group)
    return gathered


def _send_to_stages(flat: Tensor, stage: int, parallel: Parallel, to: Receivers) -> Tensor | None:
    """Send from the owning stage to all stages, or to the first."""
    owner, first = (dist.get_global_rank(parallel.pp_group, s) for s in (stage, 0))
    if to == "all":
        dist.broadcast(flat, owner, group=parallel.pp_group)
        return flat
    if stage > 0 and parallel.pp_rank == stage:
        dist.send(flat, first, group=parallel.pp_group)
    elif stage > 0 and parallel.pp_rank == 0:
        dist.recv(flat, owner, group=parallel.pp_group)
    return flat if parallel.pp_rank == 0 else None


def shard_shape(parameter: Parameter, size: int) -> torch.Size:
    """Of a rank's shard over `size` ranks."""
    tensors = [torch.empty(shape, device="meta") for _, shape in parameter.tensors[0]]
    return parameter.sharding.split(tensors, 0, size).shape


def read_shard(parameter: Parameter, parallel: Parallel, source: WeightSource) -> Tensor:
    """This rank's shard; only its slices are read from `source`."""
    rank, size, tensors = parallel.tp_rank, parallel.tp_size, parameter.tensors[0]
    if parameter.is_expert:
        rank, size = parallel.etp_rank, parallel.etp_size
        tensors = parameter.tensors[parallel.ep_rank]
    return parameter.sharding.split([source(name) for name, _ in tensors], rank, size)


def load_weights(
    chunks: Sequence[torch.nn.Module],
    mapping: Sequence[Parameter],
    parallel: Parallel,
    source: WeightSource,
) -> None:
    """Set every parameter of this rank from the full tensors of `source`.

    Raises:
        ValueError: naming a parameter of the model that the mapping lacks.
    """
    remaining = [dict(chunk.named_parameters()) for chunk in chunks]
    for parameter in mapping:
        if parameter.stage != parallel.pp_rank:
            continue
        target = remaining[parameter.chunk].pop(parameter.mcore_name)
        with torch.no_grad():
            target.copy_(read_shard(parameter, parallel, source))
    unmapped = [name for names in remaining for name in names]
    if unmapped:
        raise ValueError(f"no tensors are mapped to {', '.join(unmapped)}")
