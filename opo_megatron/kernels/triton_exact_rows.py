"""Operations of rows of exact mode (Triton): norm, rotary embedding, SwiGLU, log-softmax and sampling.

Each row is computed by one program, or by a fixed part of one, in float32 and rounded once.  Sums are not
contracted, pointers are aligned and widths constants, so that the compiled kernel, and with it the order of
a row's sum, is one for all batches.  The gradients are the usual ones.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opo_megatron.kernels.triton_exact_attention import aligned

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
MOST_WIDTH = 16384
"""A norm keeps a whole row in registers."""
BLOCK = 1024
"""Elements of a program of SwiGLU."""
VOCABULARY_BLOCK = 2048
"""Logits of a step through a row."""
HEADS_BLOCK = 4
"""Heads of a program of the rotary embedding."""


@triton.jit
def _norm_kernel(
    x, residual, weight, total, normed, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * WIDTH
    lane = tl.arange(0, PADDED)
    inside = lane < WIDTH
    value = tl.load(x + offset + lane, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + offset + lane, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + offset + lane, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value * value, 0) / WIDTH
    scale = 1.0 / tl.sqrt_rn(mean + eps)
    w = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + offset + lane, (value * scale * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _rotary_kernel(
    x, cos, sin, rotated, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
    lane = tl.arange(0, PADDED)
    is_channel = lane < HALF
    inside = (head < HEADS)[:, None] & is_channel[None, :]
    first_place = (token * HEADS + head)[:, None] * (2 * HALF) + lane[None, :]
    first = tl.load(x + first_place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + first_place + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = token * (2 * HALF) + lane
    first_cos = tl.load(cos + angle, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + angle + HALF, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    first_sin = sign * tl.load(sin + angle, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    second_sin = sign * tl.load(sin + angle + HALF, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    kind = rotated.dtype.element_ty
    tl.store(rotated + first_place, (first * first_cos - second * first_sin).to(kind), mask=inside)
    tl.store(rotated + first_place + HALF, (second * second_cos + first * second_sin).to(kind), mask=inside)


@triton.jit
def _swiglu_kernel(gate_up, product, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(product + row * WIDTH + column, value.to(product.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient_kernel(gate_up, d_product, d_gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row * (2 * WIDTH) + column
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_product + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    kind = d_gate_up.dtype.element_ty
    d_gate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(d_gate_up + place, d_gate.to(kind), mask=inside)
    tl.store(d_gate_up + place + WIDTH, (d * gate * sigmoid).to(kind), mask=inside)


@triton.jit
def _log_softmax_kernel(logits, temperatures, log_probs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    lane = tl.arange(0, BLOCK)
    # Of every lane by itself; lanes are put together once, at the end of the row.
    highest = tl.full([BLOCK], -1e30, tl.float32)  # finite, for (−∞) − (−∞) would be NaN
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, WIDTH, BLOCK):
        inside = begin + lane < WIDTH
        z = tl.load(logits + row * WIDTH + begin + lane, mask=inside, other=float("-inf")).to(tl.float32)
        z = z / temperature
        higher = tl.maximum(highest, z, propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(highest - higher) + tl.exp(z - higher)
        highest = higher
    top = tl.max(highest, 0)
    log_total = tl.log(tl.sum(total * tl.exp(highest - top), 0))
    for begin in range(0, WIDTH, BLOCK):
        inside = begin + lane < WIDTH
        z = tl.load(logits + row * WIDTH + begin + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(log_probs + row * WIDTH + begin + lane, z / temperature - top - log_total, mask=inside)


@triton.jit
def _cumulative(probabilities, before, begin, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The probabilities of a block, their cumulative sums from the row's start, and the last of them."""
    token = begin + tl.arange(0, BLOCK)
    chance = tl.load(probabilities + token, mask=token < WIDTH, other=0.0)
    cumulative = before + tl.cumsum(chance.to(tl.float64), 0)
    return token, chance, cumulative, tl.max(cumulative, 0)


@triton.jit
def _inverse_cdf_kernel(probabilities, uniforms, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    probabilities += row * WIDTH
    total = tl.zeros([], tl.float64)
    for begin in range(0, WIDTH, BLOCK):
        _, _, _, total = _cumulative(probabilities, total, begin, WIDTH, BLOCK)
    threshold = tl.load(uniforms + row) * total
    chosen = tl.full([], WIDTH, tl.int32)
    last = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.float64)
    for begin in range(0, WIDTH, BLOCK):
        token, chance, cumulative, before = _cumulative(probabilities, before, begin, WIDTH, BLOCK)
        # A parallel sum may rise by rounding where a probability is 0.
        exceeds = (cumulative > threshold) & (chance > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(exceeds, token, WIDTH), 0))
        last = tl.maximum(last, tl.max(tl.where(chance > 0, token, 0), 0))
    # The largest uniform number may round the threshold up to the total.
    tl.store(tokens + row, tl.minimum(chosen, last).to(tl.int64))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · w of each row [..., width]."""
    result: Tensor = _Norm.apply(x, weight, eps)
    return result


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, its `rms_norm`), bit for bit as in two steps; without a gradient."""
    return _norm(x, residual, weight, eps)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight, width = aligned(x), aligned(weight), x.shape[-1]
    if width > MOST_WIDTH:
        raise ValueError(f"a norm of rows of {width} elements; the kernel takes up to {MOST_WIDTH}")
    other = x if residual is None else aligned(residual)
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    if x.numel():
        _norm_kernel[(x.numel() // width,)](
            x, other, weight, total, normed, eps,
            WIDTH=width, PADDED=triton.next_power_of_2(width), HAS_RESIDUAL=residual is not None, **OPTIONS,
        )  # fmt: skip
    return total, normed


class _Norm(torch.autograd.Function):
    """The exact kernel with the usual gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _norm(x, None, weight, eps)[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            y = torch.nn.functional.rms_norm(inputs[0], (x.shape[-1],), inputs[1], ctx.eps)
        d_x, d_weight = torch.autograd.grad(y, inputs, gradients[0])
        return d_x, d_weight, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head: x [n, heads, d], cos and sin [n, d] → [n, heads, d]."""
    result: Tensor = _Rotary.apply(x, cos, sin)
    return result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = aligned(x)
    (tokens, heads, head_dim), rotated = x.shape, torch.empty_like(x)
    if tokens:
        _rotary_kernel[(tokens, triton.cdiv(heads, HEADS_BLOCK))](
            x, aligned(cos), aligned(sin), rotated, sign,
            HEADS=heads, HALF=head_dim // 2, PADDED=triton.next_power_of_2(head_dim // 2),
            HEADS_BLOCK=HEADS_BLOCK, **OPTIONS,
        )  # fmt: skip
    return rotated


class _Rotary(torch.autograd.Function):
    """The gradient is the rotation by the opposite angles: both halves of an angle are equal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, sin, -1.0), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """[n, 2 F], gate and up → silu(gate) · up [n, F]."""
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = aligned(gate_up)
        ctx.save_for_backward(gate_up)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        product = gate_up.new_empty(rows, width)
        if rows:
            _swiglu_kernel[(rows, triton.cdiv(width, BLOCK))](
                gate_up, product, WIDTH=width, BLOCK=BLOCK, **OPTIONS
            )
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,), d_product = ctx.saved_tensors, aligned(gradients[0])
        d_gate_up = torch.empty_like(gate_up)
        rows, width = d_product.shape
        if rows:
            _swiglu_gradient_kernel[(rows, triton.cdiv(width, BLOCK))](
                gate_up, d_product, d_gate_up, WIDTH=width, BLOCK=BLOCK, **OPTIONS
            )
        return d_gate_up


def log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(z / T) [n, V] float32 of logits [n, V], float32 or bf16, and temperatures [n] float32."""
    logits = aligned(logits)
    (rows, width), log_probs = logits.shape, torch.empty_like(logits, dtype=torch.float32)
    if rows:
        _log_softmax_kernel[(rows,)](
            logits, aligned(temperature), log_probs, WIDTH=width, BLOCK=VOCABULARY_BLOCK, **OPTIONS
        )
    return log_probs


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [n] int64 of probabilities [n, V] float32, not necessarily normalized, and uniform numbers [n]
    float64: the first whose cumulative probability exceeds the threshold, never one of probability 0."""
    probabilities = aligned(probabilities)
    rows, width = probabilities.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=probabilities.device)
    if rows:
        _inverse_cdf_kernel[(rows,)](
            probabilities, aligned(uniform), tokens, WIDTH=width, BLOCK=VOCABULARY_BLOCK, **OPTIONS
        )
    return tokens
