"""Attention of exact mode (Triton): one kernel for training, extend and decode."""

from __future__ import annotations

from torch import Tensor

SPLIT = 512
"""Keys of one partial result; the partial results are merged in ascending order."""


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    query_starts: Tensor,
    key_lengths: Tensor,
    most_queries: int,
    scale: float,
    positions: Tensor | None = None,
    is_split: bool | None = None,
) -> Tensor:
    """Causal attention of requests over slots of keys and values; differentiable.

    Request r has the queries query_starts[r]:query_starts[r + 1], the last ones of its key_lengths[r] keys,
    unless `positions` says otherwise.  Key j of it lies in slot table[r, j].

    Args:
        query: [n, heads, d].
        keys, values: [slots, groups, d], any strides of the first two dimensions.
        table: [requests, width] int32; entries from key_lengths[r] on are not read.
        query_starts: [requests + 1] int32.
        key_lengths: [requests] int32.
        most_queries: at least the number of queries of any request.
        positions: [n] int32, of the queries among the keys of their requests.
        is_split: whether the splits of a row are programs of their own; None chooses by shapes.  No bit
            depends on it.

    Returns:
        [n, heads, d].
    """
    raise NotImplementedError
