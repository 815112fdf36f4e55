"""Operations of rows of exact mode (Triton)."""

from __future__ import annotations

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · w of each row [..., width]."""
    raise NotImplementedError


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + residual, its `rms_norm`), bit for bit as in two steps."""
    raise NotImplementedError


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head: x [n, heads, d], cos and sin [n, d] → [n, heads, d]."""
    raise NotImplementedError


def swiglu(gate_up: Tensor) -> Tensor:
    """[n, 2 F], gate and up → silu(gate) · up [n, F]."""
    raise NotImplementedError


def log_softmax(logits: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(z / T) [n, V] float32 of logits [n, V], float32 or bf16, and temperatures [n] float32."""
    raise NotImplementedError


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens [n] int64 of probabilities [n, V] float32, not necessarily normalized, and uniform numbers [n]
    float64: the first whose cumulative probability exceeds the threshold, never one of probability 0."""
    raise NotImplementedError
