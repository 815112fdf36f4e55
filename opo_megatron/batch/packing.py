"""Packed micro-batches (THD): sequences one behind another in a single row, [1, T], and no padding between.

A micro-batch is a bin of at most `max_tokens` places.  Which sequences share one is bin packing: by falling
length, each into the fullest bin that has room (best fit).  The number of bins is what this needs, rounded
up to whole micro-batches for every rank; then the least capacity with which so many bins suffice makes them
nearly equal (multifit: Coffman, Garey and Johnson 1978), so that ranks and pipeline stages wait little, and
one shape for all has little padding.  A bin's cost is taken to be its tokens; that attention grows with the
square of a sequence's length is left out.

What stands behind the last sequence, up to T, is a sequence of its own: no token of another one attends to
it, and it has no targets.

Under context parallelism every sequence is cut into twice as many equal pieces as there are ranks, C, and
rank r has pieces r and 2C − 1 − r: of causal attention, each then has the same share.  The head's share is
what response tokens fall to a rank.  A sequence takes a multiple of 2C places; what fills it up stands behind
its last token, where no token attends to it.
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
    """Split sequences of `lengths` places into bins of at most `max_tokens`, evenly over ranks.

    A sequence above `max_tokens` is alone in its bin.

    Returns:
        [data-parallel rank][micro-batch][sequence], as many micro-batches on every rank, a multiple of
        `multiple`; and the places of the fullest.
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
    """Each sequence, longest first, into the bin with least room that has enough, or into a new one."""
    bins: list[list[int]] = []
    capacities: list[tuple[int, int]] = []  # (room, bin), sorted
    for i in order:
        place = bisect_left(capacities, (lengths[i], -1))
        if place < len(capacities):
            capacity_left, number = capacities.pop(place)
        else:
            capacity_left, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        insort(capacities, (capacity_left - lengths[i], number))
    return bins


def _assign(
    bins: Sequence[list[int]], loads: Sequence[int], dp_size: int, count: int
) -> list[list[list[int]]]:
    """At most `count` bins to every rank, the fullest first, each to the rank that has least so far."""
    per_rank: list[list[list[int]]] = [[] for _ in range(dp_size)]
    least = [(0, rank) for rank in range(dp_size)]
    for number in sorted(range(len(bins)), key=lambda n: (-loads[n], n)):
        load, rank = heapq.heappop(least)
        per_rank[rank].append(bins[number])
        if len(per_rank[rank]) < count:
            heapq.heappush(least, (load + loads[number], rank))
    return [assigned + [[] for _ in range(count - len(assigned))] for assigned in per_rank]


def segments_of(needed: Sequence[int], width: int) -> list[int]:
    """Lengths of what stands in a row of `width` places: the sequences that have any, and what is left."""
    rest = width - sum(needed)
    return [length for length in (*needed, rest) if length > 0]


def context_positions(segments: Sequence[int], rank: int, size: int) -> Tensor:
    """[T / size] places of a row of `segments` that one of `size` context-parallel ranks has, in order."""
    positions, start = [], 0
    for length in segments:
        piece = length // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            positions.append(torch.arange(start + number * piece, start + (number + 1) * piece))
        start += length
    return torch.cat(positions)


def packed_params(segments: Sequence[int], device: torch.device, context_size: int = 1) -> PackedSeqParams:
    """Where sequences begin and end, for attention and rotary embeddings: in the whole row, on every
    context-parallel rank.

    The longest length must be the true one: where it equals the row, Megatron's rotary embedding takes
    the frequencies for those of the whole row (`_apply_rotary_pos_emb_thd`).
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
        # Transformer Engine's exchange of keys and values asks for these, here the same.
        cu_seqlens_q_padded=ends if context_size > 1 else None,
        cu_seqlens_kv_padded=ends if context_size > 1 else None,
    )
