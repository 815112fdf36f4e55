"""Weights as a stream of Hugging Face tensors, gathered bucket by bucket, and the way back.

Every rank enters with the same bucket order, which follows from the table alone.  Per bucket the
owning pipeline stage gathers its shards over tensor-parallel (or expert) ranks and hands the result
to the other stages (`to="all"`) or to rank 0 alone (`to="rank0"`); then full tensors are joined from
the shards.  No rank ever holds more than a bucket besides its own shards.  No branch depends on a
tensor's value, so the same code runs on meta tensors.
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
"""Full tensor, in memory or in a file, by Hugging Face name."""
Receivers = Literal["all", "rank0"]


class Shards(Protocol):
    """Where this rank's shards come from: a model, or a checkpoint."""

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """The same on every rank, for any parameter of the table."""
        ...

    def read(self, parameter: Parameter) -> Tensor:
        """This rank's shard of a parameter of its own stage."""
        ...


class ModelShards:
    """Shards of a model's chunks."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._parameters = [dict(chunk.named_parameters()) for chunk in chunks]
        self._dtype = next(chunks[0].parameters()).dtype

    def dtype(self, parameter: Parameter) -> torch.dtype:
        return self._dtype

    def read(self, parameter: Parameter) -> Tensor:
        return self._parameters[parameter.chunk][parameter.mcore_name].detach()


def stream_weights(
    shards: Shards,
    table: Sequence[Parameter],
    parallel: Parallel,
    bucket_bytes: int,
    to: Receivers = "all",
) -> Iterator[Bucket]:
    """Yield buckets of full tensors; a collective of all ranks, which must take every bucket.

    With `to="rank0"` the buckets of every rank but rank 0 are empty.  A tensor may be the model's own
    memory: it is not to be written to, and holds these weights until the next optimizer step.
    """
    for bucket in buckets(table, bucket_bytes, shards.dtype):
        yield _gather(bucket, shards, parallel, to)


def buckets(
    table: Sequence[Parameter], limit: int, dtype: Callable[[Parameter], torch.dtype]
) -> Iterator[list[Parameter]]:
    """Runs of at most `limit` bytes (one larger parameter makes a bucket) of one owner, kind and type."""
    bucket: list[Parameter] = []
    size, kind = 0, None
    for parameter in table:
        if parameter.tied_duplicate:
            continue
        its_kind = (parameter.stage, parameter.is_expert, dtype(parameter))
        its_size = parameter.numel * its_kind[2].itemsize
        if bucket and (its_kind != kind or size + its_size > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size, kind = size + its_size, its_kind
    if bucket:
        yield bucket


def _gather(bucket: list[Parameter], shards: Shards, parallel: Parallel, to: Receivers) -> Bucket:
    groups = [(parallel.tp_size, parallel.tp_group)]
    if bucket[0].is_expert:
        groups = [(parallel.etp_size, parallel.etp_group), (parallel.ep_size, parallel.ep_group)]
    tp_size, copies = groups[0][0], math.prod(size for size, _ in groups)
    if copies == parallel.pp_size == 1 and (to == "all" or parallel.rank == 0):
        return [named for parameter in bucket for named in _join(parameter, [shards.read(parameter)], 1)]
    shapes = [_shard_shape(parameter, tp_size) for parameter in bucket]
    sizes = [math.prod(shape) for shape in shapes]
    flat = _collect(bucket, shards, parallel, to, groups, (copies, sum(sizes)))
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


def _collect(
    bucket: list[Parameter],
    shards: Shards,
    parallel: Parallel,
    to: Receivers,
    groups: list[tuple[int, Any]],
    shape: tuple[int, int],
) -> Tensor | None:
    """The shards of all ranks, one rank a row; None on a rank that does not receive them."""
    stage, is_expert = bucket[0].stage, bucket[0].is_expert
    is_owner = parallel.pp_rank == stage
    # Every copy is the same; rank 0 takes it from its own.
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
    """[rows, n] of each rank → [size · rows, n], rank by rank; with `to="rank0"` None but on the first."""
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
    """From the owning stage to all stages, or to the first."""
    owner, first = (dist.get_global_rank(parallel.pp_group, s) for s in (stage, 0))
    if to == "all":
        dist.broadcast(flat, owner, group=parallel.pp_group)
        return flat
    if stage > 0 and parallel.pp_rank == stage:
        dist.send(flat, first, group=parallel.pp_group)
    elif stage > 0 and parallel.pp_rank == 0:
        dist.recv(flat, owner, group=parallel.pp_group)
    return flat if parallel.pp_rank == 0 else None


def _shard_shape(parameter: Parameter, size: int) -> torch.Size:
    tensors = [torch.empty(shape, device="meta") for _, shape in parameter.tensors[0]]
    return parameter.sharding.split(tensors, 0, size).shape


def read_shard(parameter: Parameter, parallel: Parallel, source: WeightSource) -> Tensor:
    """This rank's shard, of which only what the rank owns is read from `source`."""
    rank, size, tensors = parallel.tp_rank, parallel.tp_size, parameter.tensors[0]
    if parameter.is_expert:
        rank, size = parallel.etp_rank, parallel.etp_size
        tensors = parameter.tensors[parallel.ep_rank]
    return parameter.sharding.split([source(name) for name, _ in tensors], rank, size)


def load_weights(
    chunks: Sequence[torch.nn.Module],
    table: Sequence[Parameter],
    parallel: Parallel,
    source: WeightSource,
) -> None:
    """Set every parameter of this rank from full tensors, `source` giving one by its Hugging Face name.

    Raises:
        ValueError: naming a parameter of the model that the table does not cover.
    """
    remaining = [dict(chunk.named_parameters()) for chunk in chunks]
    for parameter in table:
        if parameter.stage != parallel.pp_rank:
            continue
        target = remaining[parameter.chunk].pop(parameter.mcore_name)
        with torch.no_grad():
            target.copy_(read_shard(parameter, parallel, source))
    missed = [name for names in remaining for name in names]
    if missed:
        raise ValueError(f"no tensors are mapped to {', '.join(missed)}")
