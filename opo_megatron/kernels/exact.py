"""Exact mode: operations whose rows come out bit for bit the same in whatever batch they are computed.

Decoding computes one token per response at a time, training whole sequences at once.  The usual
operations then round differently, and the log-probabilities of one token differ by some 1e-6.  The
engine and the policy share the operations of this file in exact mode, and both arrive at the same
bits.  What a batch can change, and what is done about it (measured with MKL, float32, one thread):

- **Matrix products** of fewer than 4 rows, or of fewer than 12 columns, sum in another order than
  larger ones.  Linear layers multiply in tiles of `TILE` rows, the last one filled with zeros;
  attention gives at least `QUERY_ROWS` queries and a multiple of `KEY_MULTIPLE` keys; and no product
  has fewer than `COLUMNS` columns.
- **Long sums** are cut where their length says.  The sum over keys is cut here, every `KEY_BLOCK`;
  masked keys behind a response have weight 0, and adding 0 changes no bit.
- **Exponentials** are one function inside a vector register and another for what is left over, so
  where a row begins must not decide which: softmax takes rows of a multiple of `KEY_MULTIPLE` keys, and
  SwiGLU, in Megatron's MLP and in the decoder, halves of rows that hold gate and up.
- **log π** is one function, `log_softmax`, for sampler and head.

`torch.nn.functional.rms_norm`, rotary embeddings, biases and residual sums need nothing.  That all
this holds on the machine at hand is not taken on faith: a run tests it before it starts.  Only the
forward pass is made so; gradients are computed as always.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64
"""Rows of one matrix product of a linear layer."""
QUERY_ROWS = 4
"""Fewest queries of one attention product."""
COLUMNS = 16
"""Fewest columns of a product."""
KEY_MULTIPLE = 16
"""Keys are filled up to a multiple of this."""
KEY_BLOCK = 128
"""Keys that are summed by one product; BLAS cuts longer sums in halves."""
MASKED = -10000.0
"""Megatron's score of a masked key: its softmax weight underflows to 0."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ: [..., K], [N, K] → [..., N]."""
    rows = x.reshape(-1, x.shape[-1])
    result: Tensor = _Linear.apply(rows, weight) if torch.is_grad_enabled() else _tiled(rows, weight)
    return result.reshape(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """The tiled product; its gradient is that of any product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _tiled(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


def _tiled(x: Tensor, weight: Tensor) -> Tensor:
    """[n, K], [N, K] → [n, N]: one product of `TILE` rows after the other, in a single call."""
    n, width = x.shape
    tiles = -(-n // TILE)
    if n % TILE:
        filled = x.new_zeros(tiles * TILE, width)
        filled[:n] = x
        x = filled
    columns = weight.shape[0]
    if columns < COLUMNS:
        weight = F.pad(weight, (0, 0, 0, COLUMNS - columns))
    product = torch.bmm(x.view(tiles, TILE, width), weight.t().expand(tiles, -1, -1))
    return product.view(tiles * TILE, -1)[:n, :columns]


def padded_keys(length: int) -> int:
    """`length`, up to the next multiple of `KEY_MULTIPLE`."""
    return -(-length // KEY_MULTIPLE) * KEY_MULTIPLE


def causal_mask(length: int, device: torch.device) -> Tensor:
    """[length, padded keys]: True where a key is after its query, or filled up."""
    return torch.ones(length, padded_keys(length), dtype=torch.bool, device=device).triu(1)


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √width) v of every head.

    Args:
        query: [b, s, heads, width].
        keys, values: [b, groups, t, width]; groups divide heads.
        mask: True where a key is hidden, over [b, heads, s, padded t].

    Returns:
        [b, s, heads, width].
    """
    batch, length, heads, width = query.shape
    groups, total = keys.shape[1], padded_keys(keys.shape[2])
    shared = heads // groups
    rows = shared * length
    # Queries of one group stand below each other: they see the same keys.
    grouped = query.view(batch, length, groups, shared, width).permute(0, 2, 3, 1, 4)
    grouped = _with_rows(grouped.reshape(batch * groups, rows, width), QUERY_ROWS)
    keys, values = (
        _with_rows(part.reshape(batch * groups, part.shape[2], width), total) for part in (keys, values)
    )
    scores = torch.baddbmm(
        grouped.new_empty(1, 1, 1), grouped, keys.transpose(1, 2), beta=0, alpha=1 / math.sqrt(width)
    )
    scores = scores[:, :rows].reshape(batch, heads, length, total).masked_fill_(mask, MASKED)
    if width < COLUMNS:
        values = F.pad(values, (0, COLUMNS - width))
    weights = _with_rows(scores.softmax(-1).view(batch * groups, rows, total), QUERY_ROWS)
    mixed = torch.bmm(weights[:, :, :KEY_BLOCK], values[:, :KEY_BLOCK])
    for begin in range(KEY_BLOCK, total, KEY_BLOCK):
        end = begin + KEY_BLOCK
        mixed = mixed + torch.bmm(weights[:, :, begin:end], values[:, begin:end])
    return mixed[:, :rows, :width].reshape(batch, heads, length, width).transpose(1, 2)


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """[b, n, width], with zeros below where n < rows."""
    return x if x.shape[1] >= rows else F.pad(x, (0, 0, 0, rows - x.shape[1]))


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log π_T = log softmax(z / T) over the last dimension, in float32."""
    return torch.log_softmax(logits.float() / temperature, -1)
