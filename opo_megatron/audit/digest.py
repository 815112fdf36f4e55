"""A digest and the norm of every Hugging Face tensor, from the shards as they lie, without gathering any.

The digest of a tensor is Σ hash(name, element index, bits) mod 2⁶⁴ over its elements: a sum, so every
rank adds what it holds, and any layout that holds the same bits has the same digest.  Where the elements
of a shard stand in their tensors is found by cutting a tensor of positions as the layout cuts weights.
What is left out: vocabulary padding, and the copies of a tied embedding.  It takes 8 bytes for every
element of the largest shard.
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
"""Elements at once: what fits into a core's cache."""
GPU_CHUNK = 2**24
_LABEL_BITS = 58
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Digest:
    """Of one tensor, over all ranks."""

    sum: int
    """Signed 64 bits."""
    norm: float
    """√Σw², in float64."""


class Positions:
    """A tensor whose elements say where they stand, counted from 1 (0 is padding), and in which tensor."""

    def __init__(self, shape: Sequence[int], label: int, device: torch.device) -> None:
        self.shape, self._label, self._device = shape, label, device

    def __getitem__(self, index: Any) -> Tensor:
        slices = index if isinstance(index, tuple) else (index,)
        places = torch.full((), (self._label << _LABEL_BITS) + 1, dtype=torch.int64, device=self._device)
        for dim, size in enumerate(self.shape):
            start, stop, _ = (slices[dim] if dim < len(slices) else slice(None)).indices(size)
            along = torch.arange(start, max(start, stop), device=self._device)
            places = places.unsqueeze(-1) + along * math.prod(self.shape[dim + 1 :])
        return places


def digest_weights(
    chunks: Sequence[torch.nn.Module], table: Sequence[Parameter], parallel: Parallel
) -> dict[str, Digest]:
    """Of every tensor, by Hugging Face name; a collective of all ranks."""
    names = [
        name
        for parameter in table
        if not parameter.tied_duplicate
        for part in parameter.tensors
        for name, _ in part
    ]
    place = {name: i for i, name in enumerate(names)}
    sums = torch.zeros(len(names), dtype=torch.int64)
    squares = torch.zeros(len(names), dtype=torch.float64)
    shards = ModelShards(chunks)
    for turn, parameter in enumerate(table):
        if not _is_counted_here(parameter, parallel, turn):
            continue
        tensors = parameter.tensors[parallel.ep_rank if parameter.is_expert else 0]
        labels = {name: label for label, (name, _) in enumerate(tensors)}
        shapes = dict(tensors)
        positions = read_shard(
            parameter,
            parallel,
            lambda name: Positions(shapes[name], labels[name], parallel.device),  # noqa: B023
        )
        found = digest_shard(shards.read(parameter), positions, list(labels))
        for name, total, square in zip(labels, *found, strict=True):
            sums[place[name]] = total
            squares[place[name]] = square
    all_reduce(parallel, sums)
    all_reduce(parallel, squares)
    pairs = zip(names, sums.tolist(), squares.sqrt().tolist(), strict=True)
    return {name: Digest(total, norm) for name, total, norm in pairs}


def _is_counted_here(parameter: Parameter, parallel: Parallel, turn: int) -> bool:
    """Whether this rank counts its shard: one of its copies does, and they take turns."""
    if parameter.stage != parallel.pp_rank or parameter.tied_duplicate:
        return False
    is_cut = parameter.sharding.partition_dim is not None
    if parameter.is_expert:
        return parallel.edp_rank == 0 and (is_cut or parallel.etp_rank == 0)
    return parallel.dp_cp_rank == turn % parallel.dp_cp_size and (is_cut or parallel.tp_rank == 0)


def digest_shard(values: Tensor, positions: Tensor, names: Sequence[str]) -> tuple[list[int], list[float]]:
    """(sum, Σw²) of each tensor of `names` that a shard holds elements of."""
    bits = values.contiguous().view(_INTEGERS[values.element_size()]).flatten()
    values, positions = values.flatten(), positions.flatten()
    sums, squares = [0] * len(names), [0.0] * len(names)
    size = CHUNK if values.device.type == "cpu" else GPU_CHUNK
    for start in range(0, values.numel(), size):
        part = slice(start, start + size)
        places, weights = positions[part], values[part].double().square_()
        hashes = bits[part].long() * signed(FACTORS[0])
        hashes ^= (places & ((1 << _LABEL_BITS) - 1)) * signed(GOLDEN)
        for label, name in enumerate(names):
            mine = ((places >> _LABEL_BITS) == label) & (places != 0)
            sums[label] += int(mix_tensor(hashes ^ hash_of_text(name)).mul_(mine).sum())
            squares[label] += float((weights * mine).sum())
    return [_wrapped(total) for total in sums], squares


def digest_rows(name: str, keys: Tensor, values: Tensor) -> int:
    """Σ hash(name, key, bits) mod 2⁶⁴ over pairs of an int64 key and a value of 8 bytes."""
    hashes = values.view(torch.int64) * signed(FACTORS[0])
    hashes ^= mix_tensor(keys * signed(GOLDEN))
    return _wrapped(int(mix_tensor(hashes ^ hash_of_text(name)).sum()))


def _wrapped(total: int) -> int:
    return signed(total % (1 << 64))
