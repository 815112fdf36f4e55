"""Packed micro-batches (THD): sequences concatenated in a single row, [1, T], without padding between them.

A micro-batch is a bin of at most `max_tokens` tokens.  Bin packing assigns sequences in descending length,
each to the fullest bin that it fits into (best fit).  The number of bins is rounded up to the same number
of micro-batches on every rank; then the least capacity for that many bins makes them nearly equal
(multifit: Coffman, Garey and Johnson 1978), so that ranks and pipeline stages wait little and one shape for
all has little padding.  The cost of a bin is its tokens; the quadratic cost of attention is left out.

Padding after the last sequence, up to T, is a sequence of its own: no other token attends to it, and it has
no targets.

Context parallelism over C ranks splits every sequence into 2C equal chunks, and rank r holds chunks r and
2C − 1 − r, which balances causal attention.  The LM head is not balanced: it computes the response tokens
that a rank holds.  Sequences are padded to a multiple of 2C after their last token, where no token attends.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def bin_pack(
    lengths: Sequence[int], dp_size: int, max_tokens: int, multiple: int
) -> tuple[list[list[list[int]]], int]:
    """Split sequences of (padded) `lengths` into bins of at most `max_tokens`, balanced over ranks.

    A sequence longer than `max_tokens` has a bin of its own.

    Returns:
        [data-parallel rank][micro-batch][sequence], with the same bin_index of micro-batches on every rank,
        a multiple of `multiple`; and the tokens of the fullest bin.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = _best_fit(order, lengths, max_tokens)
    count = max(1, -(-len(bins) // dp_size))
    count += -count % multiple
    low, high = -(-sum(lengths) // (count * dp_size)), max_tokens
    while low < high:
        middle = (low + high) // 2
        tried = _best_fit(order, lengths, middle)
        if len(tried) <= count * dp_size:
            bins, high = tried, middle
        else:
            low = middle + 1
    loads = [sum(lengths[i] for i in one) for one in bins]
    return _assign(bins, loads, dp_size, count), max([1, *loads])


def _best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each sequence, longest first, into the fullest bin that it fits into, or into a new one."""
    bins: list[list[int]] = []
    capacities: list[tuple[int, int]] = []  # (capacity left, bin), sorted
    for i in order:
        position = bisect_left(capacities, (lengths[i], -1))
        if position < len(capacities):
            capacity_left, bin_index = capacities.pop(position)
        else:
            capacity_left, bin_index = capacity, len(bins)
            bins.append([])
        bins[bin_index].append(i)
        insort(capacities, (capacity_left - lengths[i], bin_index))
    return bins


def _assign(
    bins: Sequence[list[int]], loads: Sequence[int], dp_size: int, count: int
) -> list[list[list[int]]]:
    """Assign at most `count` bins per rank, fullest first, each to the least loaded rank."""
    per_rank: list[list[list[int]]] = [[] for _ in range(dp_size)]
    least = [(0, rank) for rank in range(dp_size)]
    for bin_index in sorted(range(len(bins)), key=lambda n: (-loads[n], n)):
        load, rank = heapq.heappop(least)
        per_rank[rank].append(bins[bin_index])
        if len(per_rank[rank]) < count:
            heapq.heappush(least, (load + loads[bin_index], rank))
    return [assigned + [[] for _ in range(count - len(assigned))] for assigned in per_rank]


def segments_of(needed: Sequence[int], width: int) -> list[int]:
    """Lengths of the segments of a row of `width` tokens: its non-empty sequences, then the padding."""
    rest = width - sum(needed)
    return [length for length in (*needed, rest) if length > 0]


def context_positions(segments: Sequence[int], rank: int, size: int) -> Tensor:
    """[T / size] positions in a row of `segments` that a context-parallel rank of `size` holds, in order."""
    positions, start = [], 0
    for length in segments:
        chunk = length // (2 * size)
        for i in (rank, 2 * size - 1 - rank):
            positions.append(torch.arange(start + i * chunk, start + (i + 1) * chunk))
        start += length
    return torch.cat(positions)


def packed_params(segments: Sequence[int], device: torch.device, context_size: int = 1) -> PackedSeqParams:
    """Sequence boundaries in the whole row, for attention and rotary embeddings of any context-parallel rank.

    `max_seqlen` must be exact: where it equals the row length, Megatron's rotary embedding takes the
    frequencies for those of the whole row (`_apply_rotary_pos_emb_thd`).
    """
    ends = torch.tensor([0, *segments]).cumsum(0).to(torch.int32)
    if device.type == "cuda":
        ends = ends.to(device)  # elsewhere they are read on the host, also for meta tensors
    longest = max(segments)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        # Required by Transformer Engine's context parallelism.
        cu_seqlens_q_padded=ends if context_size > 1 else None,
        cu_seqlens_kv_padded=ends if context_size > 1 else None,
    )
