"""Softmax and gradient of one chunk's logits (Triton) in two passes, the second in column.

    1st  reads z [m, V]:   M = max z,  Σ e,  Σ e·x,  Σ e²,  z_y      x = (z − M)/T,  e = exp x
    2nd  z ← c/T ⊙ (onehot(y) − π),                                  π = e / Σ e

They cannot be one launch: in between, the sums are reduced over vocabulary shards and the objective
computes c from log π.  The reference implementation is `_softmax` in `kernels/lm_head.py`.

The first pass reads each logit once (online softmax).  A program per row keeps, for every `GROUP` columns of
a block, the highest logit so far and the partial sums below it; nothing crosses threads before the end of
the row.  Where a block raises a maximum, M → M', its sums are rescaled.  With d = (M − M')/T and a = e^d,

    Σ e → a Σ e,   Σ e·x → a (Σ e·x + d Σ e),   Σ e² → a² Σ e².

Both passes are to be memory-bound, 2 bytes a logit in the first and 4 in the second, so a logit may cost
about 20 instructions in the first.  Exponents are in base 2, x log₂e, which saves a product per logit.

Logits are float32 or bf16; all arithmetic is float32.  The temperature divides differences to the
maximum instead of logits, which rounds less.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits per block of a program."""
WARPS = 8
GROUP = 8
"""Columns with a common maximum: those that a thread loads at once, in bf16."""
_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


class RowStatistics(NamedTuple):
    """Statistics of each token's logits in one vocabulary shard, [m] float32."""

    highest: Tensor
    """M."""
    total: Tensor
    """Σ e."""
    weighted: Tensor
    """Σ e·x."""
    squares: Tensor
    """Σ e²."""
    target: Tensor
    """z_y; 0 where the target is in another shard."""


@triton.jit
def _statistics_kernel(
    logits, targets, statistics, tokens, rows, stride, start, inverse_temperature,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row_start = logits + token * stride
    lanes = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK // GROUP], -1e30, tl.float32)  # finite, for 0 · (−∞) would be NaN
    total, weighted = tl.zeros([BLOCK // GROUP], tl.float32), tl.zeros([BLOCK // GROUP], tl.float32)
    squares = tl.zeros([BLOCK // GROUP], tl.float32)
    factor = inverse_temperature * _LOG2E
    for begin in range(0, rows, BLOCK):
        inside = begin + lanes < rows
        z = tl.load(row_start + begin + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        z = tl.reshape(z, [BLOCK // GROUP, GROUP])
        higher = tl.maximum(highest, tl.max(z, 1))
        shift = (highest - higher) * factor
        scale = tl.exp2(shift)
        # The bound makes e·x of −∞ 0, and propagates NaN.
        x = tl.maximum((z - higher[:, None]) * factor, -1e4, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(x)
        weighted = scale * (weighted + shift * total) + tl.sum(e * x, 1)
        total = scale * total + tl.sum(e, 1)
        squares = scale * scale * squares + tl.sum(e * e, 1)
        highest = higher
    top = tl.max(highest, 0)
    shift = (highest - top) * factor
    scale = tl.exp2(shift)
    weighted = scale * (weighted + shift * total)
    row = tl.load(targets + token) - start
    owned = (row >= 0) & (row < rows)
    target = tl.load(row_start + row, mask=owned, other=0.0).to(tl.float32)
    tl.store(statistics + token, top)
    tl.store(statistics + tokens + token, tl.sum(scale * total, 0))
    tl.store(statistics + 2 * tokens + token, tl.sum(weighted, 0) * _LN2)
    tl.store(statistics + 3 * tokens + token, tl.sum(scale * scale * squares, 0))
    tl.store(statistics + 4 * tokens + token, target)


@triton.jit
def _gradient_kernel(
    logits, targets, highest, total, d_log_prob, rows, stride, start, inverse_temperature, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < rows
    pointers = logits + token * stride + column
    scaled = tl.load(d_log_prob + token) * inverse_temperature
    factor = -scaled / tl.load(total + token)
    z = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    e = tl.exp((z - tl.load(highest + token)) * inverse_temperature)
    at_target = column == tl.load(targets + token) - start
    gradient = e * factor + tl.where(at_target, scaled, 0.0)
    tl.store(pointers, gradient.to(logits.dtype.element_ty), mask=inside)


def row_statistics(logits: Tensor, targets: Tensor, start: int, temperature: float) -> RowStatistics:
    """The first pass.

    Args:
        logits: [m, V] float32 or bf16, not divided by the temperature; the row stride may exceed V.
        targets: [m] int64 token ids of the whole vocabulary.
        start: first token id of this shard.
    """
    tokens, rows = logits.shape
    statistics = logits.new_empty(5, tokens, dtype=torch.float32)
    _statistics_kernel[(tokens,)](
        logits, targets, statistics, tokens, rows, logits.stride(0), start, 1.0 / temperature,
        BLOCK=BLOCK, GROUP=GROUP, num_warps=WARPS,
    )  # fmt: skip
    return RowStatistics(*statistics)


def gradient_in_place(
    logits: Tensor,
    targets: Tensor,
    start: int,
    temperature: float,
    highest: Tensor,
    total: Tensor,
    d_log_prob: Tensor,
) -> Tensor:
    """The second pass: overwrites the logits of `row_statistics` with ∂loss/∂z and returns them.

    Args:
        highest, total: M and Σ e of the whole vocabulary, [m] float32.
        d_log_prob: c [m] float32.
    """
    tokens, rows = logits.shape
    _gradient_kernel[(tokens, triton.cdiv(rows, BLOCK))](
        logits, targets, highest, total, d_log_prob.contiguous(), rows, logits.stride(0), start,
        1.0 / temperature, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return logits
