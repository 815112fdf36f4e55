"""How one Megatron parameter is cut over tensor-parallel ranks, and which Hugging Face tensors it holds.

A layout is a pair of inverse functions.  `split` makes rank r's shard from the full Hugging Face
tensors; `join` makes those tensors from the shards of all ranks, in rank order.  `split` takes from
its tensors nothing but basic slices, so it works alike on tensors in memory and in a file, and of a
file a rank reads what it owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig


class Sliceable(Protocol):
    """A tensor, or one that lies in a file."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __getitem__(self, index: Any) -> Tensor:
        """The part of a slice, or of one slice per leading dimension; steps are 1."""
        ...


class Sharding(Protocol):
    @property
    def partition_dim(self) -> int | None:
        """Dimension of the Megatron parameter that is cut; None where every rank holds all of it."""
        ...

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor: ...

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Where there is one shard, the result may be views of it."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same on every rank: norms, the router."""

    partition_dim: int | None = None

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return tensors[0][:]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Sharded:
    """Cut into equal parts along `dim`: 0 for column-parallel weights [out, in], 1 for row-parallel."""

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


@dataclass(frozen=True)
class Vocabulary:
    """Rows cut into equal parts after padding with zero rows, which no Hugging Face tensor has."""

    rows: int
    padded_rows: int | None = None
    """Rows with padding, a multiple of the ranks; default as few as that takes."""
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


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value rows interleaved by query group: each group's queries, its key, its value.

    Biases have one dimension, weights two.
    """

    groups: int
    queries_per_group: int
    width: int
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
            rows = heads * self.width
            part = tensor[groups.start * rows : groups.stop * rows]
            grouped.append(part.reshape(groups.stop - groups.start, rows, *part.shape[1:]))
        return torch.cat(grouped, 1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        full = _concatenate(shards)
        tail = full.shape[1:]
        grouped = full.reshape(self.groups, (self.queries_per_group + 2) * self.width, *tail)
        sizes = [self.queries_per_group * self.width, self.width, self.width]
        return [part.reshape(-1, *tail) for part in grouped.split(sizes, 1)]


@dataclass(frozen=True)
class GateUp:
    """[gate; up] on every rank, each cut along its rows."""

    partition_dim: int | None = 0

    def split(self, tensors: Sequence[Sliceable], rank: int, size: int) -> Tensor:
        return torch.cat([tensor[_part(tensor.shape[0], rank, size)] for tensor in tensors])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_concatenate([half[i] for half in halves]) for i in range(2)]


def _part(total: int, rank: int, size: int) -> slice:
    return slice(total // size * rank, total // size * (rank + 1))


def _concatenate(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Without a copy where there is nothing to put together."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
