"""Exact mode: batch-invariant operations, bit for bit the same row results in any batch.

Decoding computes one token per response at a time, training whole sequences.  The usual operations
then round differently, and the log-probabilities of a token differ by about 1e-6.  In exact mode the
engine and the policy share the operations of this file and get the same bits.  Sources of batch
dependence and their fixes (measured with MKL, float32, one thread):

- **Matrix products** with fewer than 4 rows or fewer than 12 columns sum in another order than
  larger ones.  Linear layers multiply in tiles of `TILE` rows; a last, smaller tile is zero-padded to
  the next of `TILE_ROWS` whose bits are those of `TILE` rows.  Attention has at least `QUERY_ROWS`
  queries and a multiple of `KEY_MULTIPLE` keys; no product has fewer than `COLUMNS` columns.
- **Long sums** are split depending on their length.  The sum over keys is split here, every
  `KEY_BLOCK`; masked keys after a response have weight 0, and adding 0 changes no bit.
- **Exponentials** differ between full vector registers and the remainder of a loop, so there is none:
  softmax takes rows of a multiple of `KEY_MULTIPLE` keys, SiLU of a multiple of `VECTOR_BYTES`.
- **log π** is one function, `log_softmax`, for sampler and LM head.

`torch.nn.functional.rms_norm`, rotary embeddings, biases and residual sums need no change.  In
bfloat16, products and attention compute in float32 from bfloat16 operands and round once; logits stay
in float32.  A run checks all this on its machine before it starts.  Only the forward pass is
batch-invariant; gradients are computed as usual.

On GPUs each of these operations is a Triton kernel (`kernels/triton_exact_*.py`), also those that need no
change on a CPU: contraction, division and alignment make library kernels differ.

SGLang's process loads this file too, so it needs nothing but torch, and Triton on GPUs.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64
"""Rows of one matrix product of a linear layer."""
TILE_ROWS = range(4, TILE, 4)
"""Rows of a smaller product, where a test shows that it gives the bits of one with `TILE` rows."""
QUERY_ROWS = 4
"""Minimum number of queries of an attention product."""
COLUMNS = 16
"""Minimum number of columns of a product."""
KEY_MULTIPLE = 16
"""Keys are padded to a multiple of this."""
KEY_BLOCK = 128
"""Keys summed by one product; BLAS splits longer sums in halves."""
VECTOR_BYTES = 128
"""Two registers of AVX-512, which a vector loop takes at once."""
MASKED = -10000.0
"""Megatron's score of a masked key: its softmax weight underflows to 0."""


INTERPRETER_VARIABLE = "OPO_EXACT_TRITON"
"""Set to 1, CPU tensors take the Triton kernels, in Triton's interpreter: for tests."""
_INTERPRETED = os.environ.get(INTERPRETER_VARIABLE) == "1"


def uses_triton(x: Tensor) -> bool:
    """Whether the operations on `x` are Triton kernels."""
    return x.is_cuda or _INTERPRETED


def linear(x: Tensor, weight: Tensor, parts: int = 1) -> Tensor:
    """x Wᵀ: [..., K], [N, K] → [..., N], in x's type.

    Args:
        parts: of the sum over K, added in order; see `partial_products`.
    """
    rows = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        result: Tensor = _Linear.apply(rows, weight, parts)
    else:
        result = _product(rows, weight, parts)
    return result.reshape(*x.shape[:-1], weight.shape[0])


def partial_products(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """[n, K], [N, K] → [parts, n, N] float32, over equal parts of K.

    Ranks that share a weight matrix by its columns compute some of the parts each; added by `add_in_order`,
    all parts give the same bits on any number of ranks.
    """
    if uses_triton(x):
        from opo_megatron.kernels.triton_exact_linear import partial_matmul

        return partial_matmul(x, weight, parts)
    pairs = zip(x.float().chunk(parts, 1), weight.float().chunk(parts, 1), strict=True)
    return torch.stack([_tiled(own.contiguous(), columns.contiguous()) for own, columns in pairs])


def add_in_order(partials: Tensor) -> Tensor:
    """[parts, …] → their sum, from the first to the last."""
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """h Wᵀ of the LM head: [n, H], [V, H] → [n, V] float32, without a gradient."""
    if uses_triton(hidden):
        from opo_megatron.kernels.triton_exact_linear import matmul

        return matmul(hidden, weight, torch.float32)
    return _tiled(hidden.float(), weight.float())


class _Linear(torch.autograd.Function):
    """The tiled product with the usual gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, parts: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x, None


def _product(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """[n, K], [N, K] → [n, N]: float32 sums, rounded once."""
    if parts == 1 and uses_triton(x):
        from opo_megatron.kernels.triton_exact_linear import matmul

        return matmul(x, weight, x.dtype)
    if parts == 1:
        return _tiled(x.float(), weight.float()).to(x.dtype)
    return add_in_order(partial_products(x, weight, parts)).to(x.dtype)


def _tiled(x: Tensor, weight: Tensor) -> Tensor:
    """[n, K], [N, K] → [n, N] of float32, in tiles of `TILE` rows and one smaller tile."""
    columns = weight.shape[0]
    if columns < COLUMNS:
        weight = F.pad(weight, (0, 0, 0, COLUMNS - columns))
    n = x.shape[0]
    whole = n // TILE
    if n % TILE == 0:
        return _whole_tiles(x, weight, whole)[:, :columns]
    rest = _last_tile(x[whole * TILE :], weight)
    if whole:
        rest = torch.cat((_whole_tiles(x[: whole * TILE], weight, whole), rest))
    return rest[:, :columns]


def _whole_tiles(x: Tensor, weight: Tensor, tiles: int) -> Tensor:
    """[tiles · TILE, K], [N, K] → [tiles · TILE, N], by a single batched call."""
    product = torch.bmm(x.view(tiles, TILE, x.shape[1]), weight.t().expand(tiles, -1, -1))
    return product.view(tiles * TILE, weight.shape[0])


def _last_tile(x: Tensor, weight: Tensor) -> Tensor:
    """[n < TILE, K], [N, K] → [n, N], zero-padded to as few rows as give the same bits."""
    n, width = x.shape
    rows = min(height for height in _heights(*weight.shape, x.device) if height >= n)
    padded = x
    if n < rows:
        padded = x.new_zeros(rows, width)
        padded[:n] = x
    return torch.mm(padded, weight.t())[:n]


@cache
def _heights(columns: int, width: int, device: torch.device) -> tuple[int, ...]:
    """`TILE`, and those of `TILE_ROWS` whose products have the same bits for this shape of weights.

    BLAS chooses its order of summation by shape.  Another order would show in about every third element of
    a product of random numbers.
    """
    generator = torch.Generator().manual_seed(0)
    float32 = torch.float32  # the server builds its model with another default
    x = torch.randn(TILE, width, generator=generator, dtype=float32).to(device)
    weight = torch.randn(min(columns, 4 * TILE), width, generator=generator, dtype=float32).to(device)
    weight = weight.repeat(-(-columns // weight.shape[0]), 1)[:columns]
    full = _whole_tiles(x, weight, 1)
    equal = (rows for rows in TILE_ROWS if torch.equal(torch.mm(x[:rows], weight.t()), full[:rows]))
    return (*equal, TILE)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x)."""
    width, multiple = x.shape[-1], VECTOR_BYTES // x.dtype.itemsize
    return F.silu(F.pad(x, (0, -width % multiple)))[..., :width] if width % multiple else F.silu(x)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: [..., 2 F] → [..., F]."""
    if uses_triton(gate_up):
        from opo_megatron.kernels import triton_exact_rows as rows

        return rows.swiglu(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · w of each row [..., width]."""
    if uses_triton(x):
        from opo_megatron.kernels import triton_exact_rows as rows

        return rows.rms_norm(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head: x [..., heads, d], cos and sin [..., 1, d]."""
    if uses_triton(x):
        from opo_megatron.kernels import triton_exact_rows as rows

        flat = (part.reshape(-1, *part.shape[-2:]) for part in (x, cos, sin))
        heads, *angles = flat
        return rows.rotary(heads, *(angle[:, 0] for angle in angles)).view_as(x)
    return rotate_halves(x, cos, sin)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary` by torch's operations."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def padded_keys(length: int) -> int:
    """`length`, rounded up to a multiple of `KEY_MULTIPLE`."""
    return -(-length // KEY_MULTIPLE) * KEY_MULTIPLE


def causal_mask(length: int, device: torch.device) -> Tensor:
    """[length, padded keys]: True where a key comes after its query or is padding."""
    return torch.ones(length, padded_keys(length), dtype=torch.bool, device=device).triu(1)


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √head_dim) v of every head, computed in float32.

    Args:
        query: [b, s, heads, head_dim].
        keys, values: [b, groups, t, head_dim]; groups divide heads.
        mask: True where a key is masked, broadcast to [b, heads, s, padded t].

    Returns:
        [b, s, heads, head_dim], in the query's type.
    """
    result_type = query.dtype
    query, keys, values = query.float(), keys.float(), values.float()
    batch, length, heads, head_dim = query.shape
    groups, total = keys.shape[1], padded_keys(keys.shape[2])
    heads_per_group = heads // groups
    rows = heads_per_group * length
    # The queries of one group attend to the same keys: one product for all of them.
    grouped = query.view(batch, length, groups, heads_per_group, head_dim).permute(0, 2, 3, 1, 4)
    grouped = _pad_rows(grouped.reshape(batch * groups, rows, head_dim), QUERY_ROWS)
    keys, values = (
        _pad_rows(part.reshape(batch * groups, part.shape[2], head_dim), total) for part in (keys, values)
    )
    scores = torch.baddbmm(
        grouped.new_empty(1, 1, 1), grouped, keys.transpose(1, 2), beta=0, alpha=1 / math.sqrt(head_dim)
    )
    scores = scores[:, :rows].reshape(batch, heads, length, total).masked_fill_(mask, MASKED)
    if head_dim < COLUMNS:
        values = F.pad(values, (0, COLUMNS - head_dim))
    weights = _pad_rows(scores.softmax(-1).view(batch * groups, rows, total), QUERY_ROWS)
    mixed = torch.bmm(weights[:, :, :KEY_BLOCK], values[:, :KEY_BLOCK])
    for begin in range(KEY_BLOCK, total, KEY_BLOCK):
        end = begin + KEY_BLOCK
        mixed = mixed + torch.bmm(weights[:, :, begin:end], values[:, begin:end])
    return mixed[:, :rows, :head_dim].reshape(batch, heads, length, head_dim).transpose(1, 2).to(result_type)


def slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    query_starts: Tensor,
    key_lengths: Tensor,
    most_queries: int,
    scale: float,
    positions: Tensor | None = None,
) -> Tensor:
    """The attention of `uses_triton` tensors; see `triton_exact_attention.attention`."""
    from opo_megatron.kernels.triton_exact_attention import attention as attention_kernel

    return attention_kernel(
        query, keys, values, table, query_starts, key_lengths, most_queries, scale, positions
    )


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """[b, n, d], zero-padded to at least `rows` rows."""
    return x if x.shape[1] >= rows else F.pad(x, (0, 0, 0, rows - x.shape[1]))


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log π_T = log softmax(z / T) over the last dimension, in float32.

    Args:
        temperature: one number, or one of each row [n, 1].
    """
    if uses_triton(logits):
        from opo_megatron.kernels import triton_exact_rows as rows

        if not isinstance(temperature, Tensor):
            temperature = torch.full((logits.shape[0],), temperature, device=logits.device)
        return rows.log_softmax(logits, temperature.flatten().float())
    return torch.log_softmax(logits.float() / temperature, -1)
