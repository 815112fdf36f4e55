"""How one Megatron parameter is cut over tensor-parallel ranks, and which Hugging Face tensors it holds.

A layout is a pair of inverse functions.  `split` makes rank r's shard from the full Hugging Face
tensors; `join` makes those tensors from the shards of all ranks, in rank order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig


class Layout(Protocol):
    @property
    def partition_dim(self) -> int | None:
        """Dimension of the Megatron parameter that is cut; None where every rank holds all of it."""
        ...

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor: ...

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True)
class Replicated:
    """The same on every rank: norms, the router."""

    partition_dim: int | None = None

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return tensors[0]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Sharded:
    """Cut into equal parts along `dim`: 0 for column-parallel weights [out, in], 1 for row-parallel."""

    dim: int

    @property
    def partition_dim(self) -> int | None:
        return self.dim

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return tensors[0].chunk(size, self.dim)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows cut into equal parts after padding with zero rows, which no Hugging Face tensor has."""

    rows: int
    padded_rows: int | None = None
    """Rows with padding, a multiple of the ranks; default as few as that takes."""
    partition_dim: int | None = 0

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        (full,) = tensors
        padding = -self.rows % size if self.padded_rows is None else self.padded_rows - self.rows
        padded = torch.cat((full, full.new_zeros(padding, full.shape[1]))) if padding else full
        return padded.chunk(size)[rank]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards))[: self.rows]]


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value rows interleaved by query group: each group's queries, its key, its value."""

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

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        tail = tensors[0].shape[1:]
        per_group = (self.queries_per_group, 1, 1)
        grouped = [
            tensor.reshape(self.groups, count * self.width, *tail)
            for tensor, count in zip(tensors, per_group, strict=True)
        ]
        return torch.cat(grouped, 1).chunk(size)[rank].reshape(-1, *tail)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        full = torch.cat(list(shards))
        tail = full.shape[1:]
        grouped = full.reshape(self.groups, (self.queries_per_group + 2) * self.width, *tail)
        sizes = [self.queries_per_group * self.width, self.width, self.width]
        return [part.reshape(-1, *tail) for part in grouped.split(sizes, 1)]


@dataclass(frozen=True)
class GateUp:
    """[gate; up] on every rank, each cut along its rows."""

    partition_dim: int | None = 0

    def split(self, tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]
