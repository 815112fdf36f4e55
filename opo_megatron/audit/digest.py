"""Digest and norm of every Hugging Face tensor, computed from the shards without gathering them.

The digest of a tensor is Σ hash(name, element index, bits) mod 2⁶⁴ over its elements: a sum over ranks, so
equal bits have equal digests under any parallel layout.  The element indices of a shard come from sharding
a tensor of positions like the weights.  Vocabulary padding and copies of a tied embedding are left out.
Memory: 8 bytes per element of the largest shard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.utils.hashing import FACTORS, GOLDEN, hash_of_text, mix_tensor, signed
from opo_megatron.weights.param_mapping import Parameter
from opo_megatron.weights.stream import ModelShards, read_shard

CHUNK = 2**16
"""Elements per chunk on a CPU: fits into a core's cache."""
GPU_CHUNK = 2**24
_LABEL_BITS = 58
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Digest:
    """Digest and norm of one tensor over all ranks."""

    sum: int
    """Signed 64-bit digest."""
    norm: float
    """√Σw², in float64."""


class Positions:
    """A tensor of element positions, counted from 1 (0 is padding), with a label in the top bits."""

    def __init__(self, shape: Sequence[int], label: int, device: torch.device) -> None:
        self.shape, self._label, self._device = shape, label, device

    def __getitem__(self, index: Any) -> Tensor:
        slices = index if isinstance(index, tuple) else (index,)
        indices = torch.full((), (self._label << _LABEL_BITS) + 1, dtype=torch.int64, device=self._device)
        for dim, size in enumerate(self.shape):
            start, stop, _ = (slices[dim] if dim < len(slices) else slice(None)).indices(size)
            along = torch.arange(start, max(start, stop), device=self._device)
            indices = indices.unsqueeze(-1) + along * math.prod(self.shape[dim + 1 :])
        return indices


def digest_weights(
    chunks: Sequence[torch.nn.Module], mapping: Sequence[Parameter], parallel: Parallel
) -> dict[str, Digest]:
    """Digest of every tensor, by Hugging Face name; a collective of all ranks."""
    names = [
        name
        for parameter in mapping
        if not parameter.tied_duplicate
        for part in parameter.tensors
        for name, _ in part
    ]
    index = {name: i for i, name in enumerate(names)}
    sums = torch.zeros(len(names), dtype=torch.int64)
    squares = torch.zeros(len(names), dtype=torch.float64)
    shards = ModelShards(chunks)
    for number, parameter in enumerate(mapping):
        if not owns_digest(parameter, parallel, number):
            continue
        tensors = parameter.tensors[parallel.ep_rank if parameter.is_expert else 0]
        labels = {name: label for label, (name, _) in enumerate(tensors)}
        shapes = dict(tensors)
        positions = read_shard(
            parameter,
            parallel,
            lambda name: Positions(shapes[name], labels[name], parallel.device),  # noqa: B023
        )
        digests = digest_shard(shards.read(parameter), positions, list(labels))
        for name, total, square in zip(labels, *digests, strict=True):
            sums[index[name]] = total
            squares[index[name]] = square
    all_reduce(parallel, sums)
    all_reduce(parallel, squares)
    pairs = zip(names, sums.tolist(), squares.sqrt().tolist(), strict=True)
    return {name: Digest(total, norm) for name, total, norm in pairs}


def owns_digest(parameter: Parameter, parallel: Parallel, number: int) -> bool:
    """Whether this rank digests its shard of the `number`-th parameter: replicas take turns."""
    if parameter.stage != parallel.pp_rank or parameter.tied_duplicate:
        return False
    is_sharded = parameter.sharding.partition_dim is not None
    if parameter.is_expert:
        return parallel.edp_rank == 0 and (is_sharded or parallel.etp_rank == 0)
    return parallel.dp_cp_rank == number % parallel.dp_cp_size and (is_sharded or parallel.tp_rank == 0)


def digest_shard(values: Tensor, positions: Tensor, names: Sequence[str]) -> tuple[list[int], list[float]]:
    """(digests, Σw²) of a shard's elements, per tensor of `names`."""
    bits = values.contiguous().view(_INTEGERS[values.element_size()]).flatten()
    values, positions = values.flatten(), positions.flatten()
    sums, squares = [0] * len(names), [0.0] * len(names)
    size = CHUNK if values.device.type == "cpu" else GPU_CHUNK
    for start in range(0, values.numel(), size):
        part = slice(start, start + size)
        indices, weights = positions[part], values[part].double().square_()
        hashes = bits[part].long() * signed(FACTORS[0])
        hashes ^= (indices & ((1 << _LABEL_BITS) - 1)) * signed(GOLDEN)
        for label, name in enumerate(names):
            mask = ((indices >> _LABEL_BITS) == label) & (indices != 0)
            sums[label] += int(mix_tensor(hashes ^ hash_of_text(name)).mul_(mask).sum())
            squares[label] += float((weights * mask).sum())
    return [_to_int64(total) for total in sums], squares


def digest_rows(name: str, keys: Tensor, values: Tensor) -> int:
    """Σ hash(name, key, bits) mod 2⁶⁴ over pairs of an int64 key and an 8-byte value."""
    hashes = values.view(torch.int64) * signed(FACTORS[0])
    hashes ^= mix_tensor(keys * signed(GOLDEN))
    return _to_int64(int(mix_tensor(hashes ^ hash_of_text(name)).sum()))


def _to_int64(total: int) -> int:
    return signed(total % (1 << 64))
