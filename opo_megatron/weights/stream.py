"""The policy's weights as a stream of Hugging Face tensors, gathered bucket by bucket.

Every rank enters with the same bucket order, which follows from the table alone.  Per bucket the
owning pipeline stage gathers its shards over tensor-parallel (or expert) ranks and broadcasts the
result over the pipeline; then each rank joins the shards into full tensors.  No rank ever holds
more than a bucket besides its own shards.  No branch depends on a tensor's value, so the same code
runs on meta tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.policy.parallel import Parallel
from opo_megatron.weights.table import Parameter

WeightSource = Callable[[str], Tensor]
"""Full tensor by Hugging Face name."""


def stream_weights(
    chunks: Sequence[torch.nn.Module], table: Sequence[Parameter], parallel: Parallel, bucket_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield buckets of (Hugging Face name, full tensor), the same on every rank.

    A tensor is valid until the next bucket is asked for.
    """
    dtype = next(chunks[0].parameters()).dtype
    local: list[dict[str, Tensor]] = [dict(chunk.named_parameters()) for chunk in chunks]
    for bucket in buckets(table, bucket_bytes // dtype.itemsize):
        yield _gather(bucket, local, parallel, dtype)


def buckets(table: Sequence[Parameter], limit: int) -> Iterator[list[Parameter]]:
    """Runs of at most `limit` elements (one larger parameter makes a bucket) with one owner and kind."""
    bucket: list[Parameter] = []
    size = 0
    for parameter in table:
        if parameter.is_copy:
            continue
        joins = bucket and (bucket[0].stage, bucket[0].is_expert) == (parameter.stage, parameter.is_expert)
        if bucket and (not joins or size + parameter.numel > limit):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel
    if bucket:
        yield bucket


def _gather(
    bucket: list[Parameter], local: list[dict[str, Tensor]], parallel: Parallel, dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    expert = bucket[0].is_expert
    groups = [(parallel.tp_size, parallel.tp_group)]
    if expert:
        groups = [(parallel.etp_size, parallel.etp_group), (parallel.ep_size, parallel.ep_group)]
    tp_size = groups[0][0]
    shapes = [_shard_shape(parameter, tp_size) for parameter in bucket]
    sizes = [math.prod(shape) for shape in shapes]
    copies = math.prod(size for size, _ in groups)
    if parallel.pp_rank == bucket[0].stage:
        flat = torch.cat([local[p.chunk][p.local_name].detach().reshape(-1) for p in bucket]).unsqueeze(0)
        for size, group in groups:
            flat = _all_gather(flat, size, group)
    else:
        flat = torch.empty(copies, sum(sizes), dtype=dtype, device=parallel.device)
    if parallel.pp_size > 1:
        source = dist.get_global_rank(parallel.pp_group, bucket[0].stage)
        dist.broadcast(flat, source, group=parallel.pp_group)
    named: list[tuple[str, Tensor]] = []
    for parameter, shape, columns in zip(bucket, shapes, flat.split(sizes, 1), strict=True):
        for rank, tensors in enumerate(parameter.tensors):
            shards = [columns[rank * tp_size + r].reshape(shape) for r in range(tp_size)]
            joined = parameter.layout.join(shards)
            named.extend((name, full) for (name, _), full in zip(tensors, joined, strict=True))
    return named


def _all_gather(flat: Tensor, size: int, group: Any) -> Tensor:
    """[rows, n] of each rank → [size · rows, n], rank by rank."""
    if size == 1:
        return flat
    gathered = flat.new_empty(size * flat.shape[0], flat.shape[1])
    dist.all_gather_into_tensor(gathered, flat.contiguous(), group=group)
    return gathered


def _shard_shape(parameter: Parameter, size: int) -> torch.Size:
    tensors = [torch.empty(shape, device="meta") for _, shape in parameter.tensors[0]]
    return parameter.layout.split(tensors, 0, size).shape


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
        target = remaining[parameter.chunk].pop(parameter.local_name)
        rank, size = parallel.tp_rank, parallel.tp_size
        tensors = parameter.tensors[0]
        if parameter.is_expert:
            rank, size = parallel.etp_rank, parallel.etp_size
            tensors = parameter.tensors[parallel.ep_rank]
        shard = parameter.layout.split([source(name) for name, _ in tensors], rank, size)
        with torch.no_grad():
            target.copy_(shard)
    missed = [name for names in remaining for name in names]
    if missed:
        raise ValueError(f"no tensors are mapped to {', '.join(missed)}")
