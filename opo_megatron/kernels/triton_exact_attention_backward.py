"""The gradient of exact mode's attention (Triton): the usual one, recomputed from the log-sum-exp.

    P = 2^(s − log-sum),  dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ − Σ dO ⊙ O) · scale,  dQ = dS K,  dK = dSᵀ Q.

One kernel has a block of keys and goes through the queries that attend to them, for dK and dV; another has a
block of queries, for dQ.  Every sum has one program, so the gradient is repeatable; it is not the same in
every batch, and need not be.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from opo_megatron.kernels.triton_exact_attention import Requests

BLOCKS = {torch.bfloat16: 64, torch.float32: 32}
"""Queries and keys of a block."""
WARPS, STAGES = 8, 2


@triton.jit
def _load(base, row, stride, exists, D: tl.constexpr, PADDED_D: tl.constexpr):
    channel = tl.arange(0, PADDED_D)
    inside = exists[:, None] & (channel < D)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _score_gradient(q, k, v, d_out, log_sum, delta, position, key, exists, is_read, factor, scale):
    """(P, dS) of a block [queries, keys]."""
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    is_seen = exists[:, None] & is_read[None, :] & (key[None, :] <= position[:, None])
    p = tl.where(is_seen, tl.exp2(score - log_sum[:, None]), 0.0)
    return p, p * (tl.dot(d_out, tl.trans(v), input_precision="ieee") - delta[:, None]) * scale


@triton.jit
def _positions_of(positions, token, index, length, count, exists, HAS_POSITIONS: tl.constexpr):
    if HAS_POSITIONS:  # noqa: SIM108 - a constant of the compiler, which compiles one branch
        position = tl.load(positions + token, mask=exists, other=-1)
    else:
        position = length - count + index
    return position


@triton.jit
def _key_kernel(
    query, keys, values, d_out, log_sums, deltas, table, query_starts, key_lengths, positions,
    d_keys, d_values, factor, scale, width, key_slot, key_group, value_slot, value_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    group, request = tl.program_id(1), tl.program_id(2)
    first_key = tl.program_id(0) * BLOCK
    length = tl.load(key_lengths + request)
    if first_key >= length:
        return
    start = tl.load(query_starts + request)
    count = tl.load(query_starts + request + 1) - start
    key = first_key + tl.arange(0, BLOCK)
    is_read = key < length
    slot = tl.load(table + request.to(tl.int64) * width + key, mask=is_read, other=0)
    k = _load(keys + group * key_group, slot, key_slot, is_read, D, PADDED_D)
    v = _load(values + group * value_group, slot, value_slot, is_read, D, PADDED_D)
    d_k, d_v = tl.zeros([BLOCK, PADDED_D], tl.float32), tl.zeros([BLOCK, PADDED_D], tl.float32)
    first_query = 0
    if not HAS_POSITIONS:
        first_query = tl.maximum(0, first_key - (length - count)) // BLOCK * BLOCK
    for head in range(group * (HEADS // GROUPS), (group + 1) * (HEADS // GROUPS)):
        for begin in range(first_query, count, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            exists = index < count
            token = start + index
            position = _positions_of(positions, token, index, length, count, exists, HAS_POSITIONS)
            row = token * HEADS + head
            q = _load(query, row, D, exists, D, PADDED_D)
            d_o = _load(d_out, row, D, exists, D, PADDED_D)
            log_sum = tl.load(log_sums + row, mask=exists, other=0.0)
            delta = tl.load(deltas + row, mask=exists, other=0.0)
            p, d_score = _score_gradient(
                q, k, v, d_o, log_sum, delta, position, key, exists, is_read, factor, scale
            )
            d_v = tl.dot(tl.trans(p).to(d_o.dtype), d_o, d_v, input_precision="ieee")
            d_k = tl.dot(tl.trans(d_score).to(q.dtype), q, d_k, input_precision="ieee")
    channel = tl.arange(0, PADDED_D)
    inside = is_read[:, None] & (channel < D)[None, :]
    places = (slot.to(tl.int64) * GROUPS + group)[:, None] * D + channel[None, :]
    tl.store(d_keys + places, d_k.to(d_keys.dtype.element_ty), mask=inside)
    tl.store(d_values + places, d_v.to(d_values.dtype.element_ty), mask=inside)


@triton.jit
def _query_kernel(
    query, keys, values, d_out, log_sums, deltas, table, query_starts, key_lengths, positions,
    d_query, factor, scale, width, key_slot, key_group, value_slot, value_group,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    head, request = tl.program_id(1), tl.program_id(2)
    group = head // (HEADS // GROUPS)
    start = tl.load(query_starts + request)
    count = tl.load(query_starts + request + 1) - start
    if tl.program_id(0) * BLOCK >= count:
        return
    length = tl.load(key_lengths + request)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < count
    token = start + index
    position = _positions_of(positions, token, index, length, count, exists, HAS_POSITIONS)
    row = token * HEADS + head
    q = _load(query, row, D, exists, D, PADDED_D)
    d_o = _load(d_out, row, D, exists, D, PADDED_D)
    log_sum = tl.load(log_sums + row, mask=exists, other=0.0)
    delta = tl.load(deltas + row, mask=exists, other=0.0)
    d_q = tl.zeros([BLOCK, PADDED_D], tl.float32)
    end = tl.minimum(tl.max(tl.where(exists, position, -1), 0) + 1, length)
    for first_key in range(0, end, BLOCK):
        key = first_key + tl.arange(0, BLOCK)
        is_read = key < end
        slot = tl.load(table + request.to(tl.int64) * width + key, mask=is_read, other=0)
        k = _load(keys + group * key_group, slot, key_slot, is_read, D, PADDED_D)
        v = _load(values + group * value_group, slot, value_slot, is_read, D, PADDED_D)
        _, d_score = _score_gradient(
            q, k, v, d_o, log_sum, delta, position, key, exists, is_read, factor, scale
        )
        d_q = tl.dot(d_score.to(k.dtype), k, d_q, input_precision="ieee")
    channel = tl.arange(0, PADDED_D)
    inside = exists[:, None] & (channel < D)[None, :]
    places = row.to(tl.int64)[:, None] * D + channel[None, :]
    tl.store(d_query + places, d_q.to(d_query.dtype.element_ty), mask=inside)


def backward(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    log_sums: Tensor,
    d_output: Tensor,
    requests: Requests,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, keys and values."""
    from opo_megatron.kernels.triton_exact_attention import LOG2E

    query, d_output = query.contiguous(), d_output.contiguous()
    (_, heads, head_dim), groups = query.shape, keys.shape[1]
    deltas = (d_output.float() * output.float()).sum(-1)
    d_query = torch.empty_like(query)
    d_keys, d_values = (
        torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in (keys, values)
    )
    block, (count, width) = BLOCKS[query.dtype], requests.table.shape
    has_positions = requests.positions is not None
    inputs = (
        query, keys, values, d_output, log_sums, deltas,
        requests.table, requests.query_starts, requests.key_lengths,
        requests.positions if has_positions else requests.key_lengths,
    )  # fmt: skip
    scalars = (
        requests.scale * LOG2E, requests.scale, requests.table.stride(0),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
    )  # fmt: skip
    options = {
        "HEADS": heads, "GROUPS": groups, "D": head_dim,
        "PADDED_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK": block, "HAS_POSITIONS": has_positions, "num_warps": WARPS, "num_stages": STAGES,
    }  # fmt: skip
    _key_kernel[(triton.cdiv(width, block), groups, count)](*inputs, d_keys, d_values, *scalars, **options)
    _query_kernel[(triton.cdiv(requests.most_queries, block), heads, count)](
        *inputs, d_query, *scalars, **options
    )
    return d_query, d_keys, d_values
