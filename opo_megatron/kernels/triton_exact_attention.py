"""Attention of exact mode (Triton): one kernel for training, extend and decode.

A program has a tile of `ROWS` rows, the heads of one group × some queries of one request.  It takes blocks of
`BLOCK` keys from key 0 upwards, by a table of slots: those of the engine's cache, in training the rows
themselves.  The softmax is online, in float32, with exponents in base 2:

    m' = max(m, max s),   l ← 2^(m − m') l + Σ 2^(s − m'),   a ← 2^(m − m') a + Σ 2^(s − m') v.

Why a row has the same bits wherever it stands:

- Every product has one shape, whatever the number of queries, and keys are blocked from key 0.
- A masked or absent key has weight 0, and a block or split without a key of the row leaves it as it is.
- At every `SPLIT` keys a new partial result begins, and they are merged in ascending order.  While decoding,
  where there are few rows, the partial results are programs of their own and merged by a second kernel.
- Warps and stages are fixed, nothing is tuned, products and sums are not contracted, and the layout depends
  on no value: sizes of a head are constants, other integers are not specialized.

The launch follows from shapes and `most_queries` alone, so a CUDA graph can hold it.  The gradient is that of
`triton_exact_attention_backward.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Rows of a tile, the fewest of a tensor core's product."""
BLOCK = 32
"""Keys of a block."""
SPLIT = 512
"""Keys of one partial result."""
WARPS, STAGES = 4, 3
FEW_PROGRAMS = 512
"""With fewer programs, an H100's 132 SMs idle, and the partial results become programs."""
LOG2E = 1.4426950408889634
_LOWEST = tl.constexpr(-1e30)  # finite, for (−∞) − (−∞) would be NaN
_UNSPECIALIZED = ("width", "tokens", "splits", "key_slot", "key_group", "value_slot", "value_group")


@triton.jit
def _rows_of_tile(
    query_starts, key_lengths, positions, group, request, tile,
    SHARED: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """(token, head, position, whether the row exists) of each row, and the number of keys that they read."""
    start = tl.load(query_starts + request)
    count = tl.load(query_starts + request + 1) - start
    length = tl.load(key_lengths + request)
    row = tile * ROWS + tl.arange(0, ROWS)
    index, head = row // PADDED, row % PADDED
    exists = (index < count) & (head < SHARED)
    token = start + index
    if HAS_POSITIONS:  # noqa: SIM108 - a constant of the compiler, which compiles one branch
        position = tl.load(positions + token, mask=exists, other=-1)
    else:
        position = length - count + index
    position = tl.where(exists, position, -1)
    end = tl.minimum(tl.max(position, 0) + 1, length)
    return token.to(tl.int64), group * SHARED + head, position, exists, end


@triton.jit
def _partial(
    q, keys, values, slots, position, begin, end, factor, key_slot, value_slot,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and mixed values of the keys from `begin` to the end of its split."""
    channel = tl.arange(0, PADDED_D)
    highest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED_D], tl.float32)
    for first in range(begin, tl.minimum(end, begin + SPLIT), BLOCK):
        key = first + tl.arange(0, BLOCK)
        is_read = key < end
        slot = tl.load(slots + key, mask=is_read, other=0).to(tl.int64)
        key_offset = slot * key_slot * UNIT  # a product with a constant tells the compiler the alignment
        value_offset = slot * value_slot * UNIT
        inside = is_read[:, None] & (channel < D)[None, :]
        k = tl.load(keys + key_offset[:, None] + channel[None, :], mask=inside, other=0.0)
        v = tl.load(values + value_offset[:, None] + channel[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        is_seen = key[None, :] <= position[:, None]
        score = tl.where(is_seen, score, _LOWEST)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.where(is_seen, tl.exp2(score - higher[:, None]), 0.0)
        scale = tl.exp2(highest - higher)
        next_mixed = tl.dot(weight.to(v.dtype), v, mixed * scale[:, None], input_precision="ieee")
        has_key = first <= position
        mixed = tl.where(has_key[:, None], next_mixed, mixed)
        total = tl.where(has_key, total * scale + tl.sum(weight, 1), total)
        highest = higher
    return highest, total, mixed


@triton.jit
def _merge(highest, total, mixed, other_highest, other_total, other_mixed):
    """Two partial results, the earlier keys first; the second one may have no key."""
    higher = tl.maximum(highest, other_highest)
    scale, other_scale = tl.exp2(highest - higher), tl.exp2(other_highest - higher)
    has_key = other_total != 0
    total = tl.where(has_key, total * scale + other_total * other_scale, total)
    both = mixed * scale[:, None] + other_mixed * other_scale[:, None]
    mixed = tl.where(has_key[:, None], both, mixed)
    return tl.where(has_key, higher, highest), total, mixed


@triton.jit
def _store(
    output, log_sums, highest, total, mixed, token, head, exists,
    HEADS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, PADDED_D)
    row = token * HEADS + head
    inside = exists[:, None] & (channel < D)[None, :]
    # 0 is added because a block of weights 0 may turn −0 into 0.
    result = mixed / total[:, None] + 0.0
    tl.store(output + row[:, None] * D + channel[None, :], result.to(output.dtype.element_ty), mask=inside)
    tl.store(log_sums + row, highest + tl.log2(total), mask=exists)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _kernel(
    query, keys, values, table, query_starts, key_lengths, positions,
    output, log_sums, part_sums, part_mixed,
    factor, width, tokens, splits, key_slot, key_group, value_slot, value_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, HAS_POSITIONS: tl.constexpr, IS_SPLIT: tl.constexpr,
):  # fmt: skip
    # Strides of keys and values are in units of UNIT elements.
    tile, request = tl.program_id(0), tl.program_id(2)
    group, split = tl.program_id(1) % GROUPS, tl.program_id(1) // GROUPS
    token, head, position, exists, end = _rows_of_tile(
        query_starts, key_lengths, positions, group, request, tile,
        HEADS // GROUPS, PADDED, ROWS, HAS_POSITIONS,
    )  # fmt: skip
    if end <= split * SPLIT:
        return
    channel = tl.arange(0, PADDED_D)
    row = token * HEADS + head
    inside = exists[:, None] & (channel < D)[None, :]
    q = tl.load(query + row[:, None] * D + channel[None, :], mask=inside, other=0.0)
    slots = table + request.to(tl.int64) * width
    keys += group * key_group * UNIT
    values += group * value_group * UNIT
    if IS_SPLIT:
        highest, total, mixed = _partial(
            q, keys, values, slots, position, split * SPLIT, end, factor, key_slot, value_slot,
            D, PADDED_D, ROWS, BLOCK, SPLIT, UNIT,
        )  # fmt: skip
        size = tokens.to(tl.int64) * HEADS
        row += split * size
        tl.store(part_sums + row, highest, mask=exists)
        tl.store(part_sums + splits * size + row, total, mask=exists)
        tl.store(part_mixed + row[:, None] * D + channel[None, :], mixed, mask=inside)
    else:
        highest = tl.full([ROWS], _LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, PADDED_D], tl.float32)
        for begin in range(0, end, SPLIT):
            other_highest, other_total, other_mixed = _partial(
                q, keys, values, slots, position, begin, end, factor, key_slot, value_slot,
                D, PADDED_D, ROWS, BLOCK, SPLIT, UNIT,
            )  # fmt: skip
            highest, total, mixed = _merge(highest, total, mixed, other_highest, other_total, other_mixed)
        _store(output, log_sums, highest, total, mixed, token, head, exists, HEADS, D, PADDED_D)


@triton.jit(do_not_specialize=("tokens", "splits"))
def _merge_kernel(
    query_starts, key_lengths, positions, output, log_sums, part_sums, part_mixed, tokens, splits,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    token, head, _position, exists, end = _rows_of_tile(
        query_starts, key_lengths, positions, tl.program_id(1), tl.program_id(2), tl.program_id(0),
        HEADS // GROUPS, PADDED, ROWS, HAS_POSITIONS,
    )  # fmt: skip
    channel = tl.arange(0, PADDED_D)
    inside = exists[:, None] & (channel < D)[None, :]
    size = tokens.to(tl.int64) * HEADS
    row = token * HEADS + head
    highest = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED_D], tl.float32)
    for _begin in range(0, end, SPLIT):
        other_highest = tl.load(part_sums + row, mask=exists, other=_LOWEST)
        other_total = tl.load(part_sums + splits * size + row, mask=exists, other=0.0)
        other_mixed = tl.load(part_mixed + row[:, None] * D + channel[None, :], mask=inside, other=0.0)
        highest, total, mixed = _merge(highest, total, mixed, other_highest, other_total, other_mixed)
        row += size
    _store(output, log_sums, highest, total, mixed, token, head, exists, HEADS, D, PADDED_D)


class Requests(NamedTuple):
    """Which queries attend to which slots; see `attention`."""

    table: Tensor
    query_starts: Tensor
    key_lengths: Tensor
    positions: Tensor | None
    most_queries: int
    scale: float


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
    requests = Requests(table, query_starts, key_lengths, positions, most_queries, scale)
    if torch.is_grad_enabled() and query.requires_grad:
        result: Tensor = _Attention.apply(query, keys, values, requests, is_split)
        return result
    return forward(query, keys, values, requests, is_split)[0]


class _Attention(torch.autograd.Function):
    """The exact kernel with the usual gradient."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, requests: Requests, is_split: bool | None
    ) -> Tensor:
        output, log_sums = forward(query, keys, values, requests, is_split)
        ctx.save_for_backward(query, keys, values, output, log_sums)
        ctx.requests = requests
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from opo_megatron.kernels.triton_exact_attention_backward import backward

        query, keys, values, output, log_sums = ctx.saved_tensors
        computed = backward(query, keys, values, output, log_sums, gradients[0], ctx.requests)
        return *computed, None, None


def constants(heads: int, groups: int, head_dim: int) -> dict[str, int]:
    """The kernel's constants for these sizes."""
    return {
        "HEADS": heads,
        "GROUPS": groups,
        "PADDED": triton.next_power_of_2(heads // groups),
        "D": head_dim,
        "PADDED_D": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": ROWS,
        "SPLIT": SPLIT,
    }


def forward(
    query: Tensor, keys: Tensor, values: Tensor, requests: Requests, is_split: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The output [n, heads, d], and log₂ Σ 2^s of each row [n, heads] float32."""
    query = aligned(query)
    (tokens, heads, head_dim), groups = query.shape, keys.shape[1]
    output = torch.empty_like(query)
    log_sums = query.new_empty(tokens, heads, dtype=torch.float32)
    sizes = constants(heads, groups, head_dim)
    unit = math.gcd(8, head_dim)
    count, width = requests.table.shape
    tiles = triton.cdiv(requests.most_queries * sizes["PADDED"], ROWS)
    splits = triton.cdiv(width, SPLIT)
    if tokens == 0:
        return output, log_sums
    if is_split is None:
        is_split = splits > 1 and tiles * groups * count < FEW_PROGRAMS
    part_sums = part_mixed = log_sums
    if is_split:
        part_sums = query.new_empty(2, splits, tokens, heads, dtype=torch.float32)
        part_mixed = query.new_empty(splits, tokens, heads, head_dim, dtype=torch.float32)
    has_positions = requests.positions is not None
    positions = requests.positions if has_positions else requests.key_lengths
    boundaries = (requests.query_starts, requests.key_lengths, positions)
    options = {"num_warps": WARPS, "num_stages": STAGES, "enable_fp_fusion": False}
    _kernel[(tiles, groups * (splits if is_split else 1), count)](
        query, keys, values, requests.table, *boundaries, output, log_sums, part_sums, part_mixed,
        requests.scale * LOG2E, requests.table.stride(0), tokens, splits,
        *(stride // unit for part in (keys, values) for stride in part.stride()[:2]),
        BLOCK=BLOCK, UNIT=unit, HAS_POSITIONS=has_positions, IS_SPLIT=is_split, **sizes, **options,
    )  # fmt: skip
    if is_split:
        _merge_kernel[(tiles, groups, count)](
            *boundaries, output, log_sums, part_sums, part_mixed, tokens, splits,
            HAS_POSITIONS=has_positions, **sizes, **options,
        )  # fmt: skip
    return output, log_sums


def aligned(x: Tensor) -> Tensor:
    """`x`, contiguous and aligned to 16 bytes: one compiled kernel serves all batches."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
