"""Block-wise FP8 quantization of weights, one scale per 128×128 block: the format of DeepSeek-V3.

For a block B with amax = max |w|, every weight becomes

    e = 448 / amax,    q = round_to_E4M3(w · e),    dequantized  q · s  with  s = 1 / e,

where 448 is the largest E4M3 number.  Quotients and products are float32, rounded to nearest, ties to even:
the arithmetic of Transformer Engine's kernel, so that trainer and server have the same bytes (w / s would
round a few of them to the other side).  Power-of-two scales (UE8M0) round e down: nothing overflows, the
product is exact, and up to half of the range is unused.

The rounding error is at most 2⁻⁴ relative for a normal number, 2⁻¹⁰ · s for a subnormal one
(|w| < 2⁻⁶ · s).  A shard split at multiples of 128 has the same bytes as the full matrix; another
shard has not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.config.choices import FP8_BLOCK, Scales
from opo_megatron.errors import UserError

__all__ = ["Scales", "blocks", "dequantize_blocks", "quantize_blocks"]

LARGEST = 448.0
"""Largest number of E4M3 without infinities (torch.float8_e4m3fn)."""
STRIP_ELEMENTS = 2**22
"""Weights quantized at a time, which bounds the float32 buffer."""


@torch.no_grad()
def quantize_blocks(name: str, weight: Tensor, scales: Scales = Scales.fp32) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to FP8.

    Args:
        name: of the tensor, for the error.
        weight: [rows, columns], any float type; blocks at the lower and right edge may be smaller.

    Returns:
        float8_e4m3fn [rows, columns], and the scales s, float32 [⌈rows/128⌉, ⌈columns/128⌉], stored as
        `weight_scale_inv`.  The scale of a block of zeros is 1, as in transformers' quantizer.

    Raises:
        UserError: where a weight is NaN or infinite.
    """
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    high, wide = blocks(rows), blocks(columns)
    scale = torch.empty(high, wide, dtype=torch.float32, device=weight.device)
    step = max(1, STRIP_ELEMENTS // max(1, wide * FP8_BLOCK * FP8_BLOCK))
    for first in range(0, high, step):
        part = slice(first * FP8_BLOCK, min(rows, (first + step) * FP8_BLOCK))
        values, scale[first : first + step] = _quantize_strip(weight[part], scales)
        quantized[part] = values
    if not bool(scale.isfinite().all()):
        raise not_finite(name)
    return quantized, scale


def not_finite(name: str) -> UserError:
    """The error for weights that no scale fits."""
    return UserError(
        f"{name} holds NaN or infinite weights, which have no FP8 scale; export another checkpoint"
    )


def _quantize_strip(weight: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """`quantize_blocks` of whole rows of blocks; the scale of a block with NaN or infinity is non-finite."""
    rows, columns = weight.shape
    padding = (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    padded = torch.nn.functional.pad(weight.float(), padding) if any(padding) else weight.float()
    tiles = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)
    factor = _factors(tiles.abs().amax((1, 3)), weight.dtype, scales)
    product = (tiles * factor[:, None, :, None]).clamp_(-LARGEST, LARGEST)
    values = product.view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return values, factor.reciprocal()


def _factors(largest: Tensor, dtype: torch.dtype, scales: Scales) -> Tensor:
    """e of blocks with these maxima; NaN where a maximum is not finite.

    Where 448 / amax is beyond float32, Transformer Engine takes the largest number of the weights' type.
    """
    limit = torch.finfo(dtype if dtype.itemsize == 2 else torch.float32).max
    factor = torch.full_like(largest, LARGEST) / largest  # `448 / largest` would round twice
    factor = torch.where(factor.isinf(), limit, factor)
    if scales is Scales.power_of_two:  # rounded down: the bits of the fraction are cleared
        factor = (factor.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
    factor = torch.where(largest == 0, 1.0, factor)
    return torch.where(largest.isfinite(), factor, torch.nan)


def dequantize_blocks(quantized: Tensor, scale: Tensor) -> Tensor:
    """q · s in float32 [rows, columns]."""
    rows, columns = quantized.shape
    expanded = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return quantized.float() * expanded


def blocks(size: int) -> int:
    """Number of blocks along a dimension; the last one may be smaller."""
    return -(-size // FP8_BLOCK)
