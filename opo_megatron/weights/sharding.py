"""Sharding of a parameter over tensor-parallel ranks: Megatron's shards, and the slices of SGLang.

`split` and `join` are inverse.  `split` returns rank r's shard of the full Hugging Face tensors; `join`
returns those tensors from the shards of all ranks, in rank order, or the part of them that some consecutive
shards hold.  `split` uses only basic slices, so it works on tensors in memory and in a file, and a rank reads
only what it owns.

`engine_rows` returns an engine rank's slice of the same tensors.  SGLang fuses tensors one after the other
(queries, keys, values), so its slice is a list of parts; Megatron interleaves them by group.  The slice of
part of the tensors is that part of the slice: a shard is cut without its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig


class Sliceable(Protocol):
    """A tensor in memory or in a file."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor:
        """One slice, or one per leading dimension, with step 1."""
        ...


class Sharding(Protocol):
    @property
    def partition_dim(self) -> int | None:
        """Dimension along which the Megatron parameter is sharded; None if it is replicated."""
        ...

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor: ...

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The full tensors; with one shard they may be views of it."""
        ...

    def engine_rows(self, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
        """An engine rank's slice: views to be concatenated along dimension 0."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same on every rank: norms, the router."""

    partition_dim: int | None = None

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return tensors[0][:]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]

    def engine_rows(self, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
        return [tensors[0]]


@dataclass(frozen=True)
class Sharded:
    """Split into equal parts along `dim`: 0 for column-parallel weights [out, in], 1 for row-parallel."""

    dim: int

    @property
    def partition_dim(self) -> int | None:
        return self.dim

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        (full,) = tensors
        part = _part(full.shape[self.dim], rank, size)
        return full[part] if self.dim == 0 else full[:, part]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_concatenate(shards, self.dim)]

    def engine_rows(self, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
        (full,) = tensors
        part = _part(full.shape[self.dim], rank, size)
        return [full[part] if self.dim == 0 else full[:, part]]


@dataclass(frozen=True)
class Vocabulary:
    """Rows, padded with zero rows, split into equal parts; Hugging Face tensors have no padding."""

    rows: int
    padded_rows: int | None = None
    """Rows with padding, a multiple of the ranks; default: the smallest."""
    partition_dim: int | None = 0

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        (full,) = tensors
        padded = self.rows + -self.rows % size if self.padded_rows is None else self.padded_rows
        part = _part(padded, rank, size)
        rows = full[min(part.start, self.rows) : min(part.stop, self.rows)]
        missing = part.stop - part.start - rows.shape[0]
        return torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [_concatenate(shards)[: self.rows]]

    def engine_rows(self, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
        """Of all rows: another padding has other boundaries."""
        (full,) = tensors
        part = _part(engine_vocab_rows(self.rows, size), rank, size)
        rows = full[min(part.start, self.rows) : min(part.stop, self.rows)]
        return [rows, rows.new_zeros(part.stop - part.start - rows.shape[0], *rows.shape[1:])]

    def aligned(self, policy_size: int, engine_size: int) -> bool:
        """Whether shards and slices have the same padding, and so the same boundaries."""
        padded = self.rows + -self.rows % policy_size if self.padded_rows is None else self.padded_rows
        return padded == engine_vocab_rows(self.rows, engine_size)


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value rows interleaved by query group: each group's queries, its key, its value.

    Biases have one dimension, weights two.
    """

    groups: int
    queries_per_group: int
    head_dim: int
    partition_dim: int | None = 0

    @staticmethod
    def of(model: ModelConfig) -> QueryKeyValue:
        assert model.num_query_groups is not None and model.kv_channels is not None
        return QueryKeyValue(
            model.num_query_groups, model.num_attention_heads // model.num_query_groups, model.kv_channels
        )

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        groups = _part(self.groups, rank, size)
        grouped = []
        for tensor, heads in zip(tensors, (self.queries_per_group, 1, 1), strict=True):
            rows = heads * self.head_dim
            part = tensor[groups.start * rows : groups.stop * rows]
            grouped.append(part.reshape(groups.stop - groups.start, rows, *part.shape[1:]))
        return torch.cat(grouped, 1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        full = _concatenate(shards)
        tail = full.shape[1:]
        grouped = full.reshape(-1, (self.queries_per_group + 2) * self.head_dim, *tail)
        sizes = [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.reshape(-1, *tail) for part in grouped.split(sizes, 1)]

    def engine_rows(self, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
        """Where there are fewer groups than ranks, several ranks hold copies of the same key and value."""
        query, key, value = tensors
        owners = min(size, key.shape[0] // self.head_dim)
        owned = _part(key.shape[0], rank * owners // size, owners)
        return [query[_part(query.shape[0], rank, size)], key[owned], value[owned]]


@dataclass(frozen=True)
class GateUp:
    """[gate; up] on every rank, each split along its rows."""

    partition_dim: int | None = 0

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return torch.cat([tensor[_part(tensor.shape[0], rank, size)] for tensor in tensors])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_concatenate([half[i] for half in halves]) for i in range(2)]

    def engine_rows(self, tensors: Sequence[Tensor], rank: int, size: int) -> list[Tensor]:
        return [tensor[_part(tensor.shape[0], rank, size)] for tensor in tensors]


VOCAB_MULTIPLE = 64
"""SGLang pads its vocabulary to a multiple of this."""


def engine_vocab_rows(rows: int, size: int) -> int:
    """Rows of SGLang's embedding over all ranks; on a CPU it pads further where they do not divide."""
    padded = -(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    multiple = VOCAB_MULTIPLE * size
    return padded if padded % size == 0 else -(-rows // multiple) * multiple


def _part(total: int, rank: int, size: int) -> slice:
    return slice(total // size * rank, total // size * (rank + 1))


def _concatenate(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` without a copy of a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
