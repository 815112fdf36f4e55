"""Where the rows of a micro-batch stand, as tables of exact mode's attention on GPUs.

Nothing is read back to the host: tables are computed on the device from the boundaries of the sequences, once
per micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

_ATTRIBUTE = "opo_exact_rows"


@dataclass(frozen=True)
class AttendedRows:
    """Arguments of `exact.slot_attention`: a request is a sequence."""

    table: Tensor
    """[requests, longest] int32."""
    query_starts: Tensor
    """[requests + 1] int32."""
    key_lengths: Tensor
    """[requests] int32."""
    positions: Tensor
    """[n] int32: of each row in its sequence."""
    most_queries: int
    is_sharded: bool = False
    """Whether other ranks have queries of the same sequences."""

    @property
    def attended_positions(self) -> Tensor | None:
        """None where queries are the last of their keys."""
        return self.positions if self.is_sharded else None


@lru_cache(maxsize=4)
def padded_rows(count: int, length: int, device: torch.device) -> AttendedRows:
    """Of `count` sequences of `length` rows each, one after another."""
    slots = torch.arange(count * length, dtype=torch.int32, device=device)
    starts = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=device)
    return AttendedRows(slots.view(count, length), starts, starts.diff(), slots % length, length)


def packed_rows(packed: PackedSeqParams, rows: int) -> AttendedRows:
    """Of packed sequences of which this context-parallel rank has `rows` rows, and after all ranks' keys
    were gathered in the order of the ranks."""
    known: AttendedRows | None = getattr(packed, _ATTRIBUTE, None)
    if known is None:
        size = parallel_state.get_context_parallel_world_size()
        rank = parallel_state.get_context_parallel_rank()
        known = rows_of(packed.cu_seqlens_q, packed.max_seqlen_q, rows, rank, size)
        setattr(packed, _ATTRIBUTE, known)
    return known


def rows_of(ends: Tensor, longest: int, rows: int, rank: int, size: int) -> AttendedRows:
    """Args:
    ends: [requests + 1] boundaries of the sequences in the whole row; multiples of 2 size if sharded.
    longest: length of the longest sequence.
    """
    local = ends // size
    index = torch.arange(rows, device=ends.device)
    sequence = torch.searchsorted(local[1:].long(), index, right=True)
    offset = index - local[sequence]
    place = torch.arange(longest, device=ends.device)
    starts, lengths = local[:-1].unsqueeze(1), ends.diff()
    if size == 1:
        return AttendedRows(
            (starts + place).int(), ends.int(), lengths.int(), offset.int(), longest, is_sharded=False
        )
    # A rank has chunks `rank` and `2 size − 1 − rank` of the 2 size chunks of every sequence.
    chunk = (lengths // (2 * size))[sequence]
    positions = offset + chunk * torch.where(offset < chunk, rank, 2 * size - 2 - rank)
    chunks = (lengths // (2 * size)).unsqueeze(1).clamp(min=1)
    number, within = place // chunks, place % chunks
    owner = torch.where(number < size, number, 2 * size - 1 - number)
    table = owner * rows + starts + within + torch.where(number < size, 0, chunks)
    return AttendedRows(
        table.int(), local.int(), lengths.int(), positions.int(), -(-longest // size), is_sharded=True
    )
