"""The FP8 quantizer of weights, one scale for every 128×128 block: the layout of DeepSeek-V3's files.

For a block B with amax = max |w|, s = amax / 448, and every weight becomes

    q = round_to_E4M3(w / s),    dequantized  q · s,

448 being the largest E4M3 number, so that a block's largest weight takes the largest number.  The
quotient is float32's, the rounding to nearest, ties to even, as torch and the hardware do it.  With
powers of two s is rounded up to the next one (UE8M0): nothing overflows, the quotient is exact, and up
to half of the range goes unused.

A relative error of 2⁻⁴ is the most that rounding makes of a normal number, 2⁻¹⁰ · s of a subnormal one
(|w| < 2⁻⁶ · s).  A shard that is cut at multiples of 128 has the bytes of the whole matrix there; one
that is cut elsewhere has not.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from opo_megatron.config.choices import FP8_BLOCK
from opo_megatron.errors import UserError

LARGEST = 448.0
"""Of E4M3 without infinities (torch.float8_e4m3fn)."""
SMALLEST_SCALE = 2.0**-126
"""float32's smallest normal number: blocks below 448 times that use less of the range."""
STRIP_ELEMENTS = 2**22
"""Weights that are quantized at a time: what is held in float32 besides the result."""


class Scales(Enum):
    """Which numbers scales may be."""

    fp32 = "fp32"
    power_of_two = "power_of_two"


@torch.no_grad()
def quantize_blocks(name: str, weight: Tensor, scales: Scales = Scales.fp32) -> tuple[Tensor, Tensor]:
    """A matrix in FP8, and what its blocks are to be multiplied by.

    Args:
        name: of the tensor, for the error.
        weight: [rows, columns], any float type; blocks at the lower and right edge may be smaller.

    Returns:
        float8_e4m3fn [rows, columns], and float32 [⌈rows/128⌉, ⌈columns/128⌉], the file's
        `weight_scale_inv`.  The scale of a block of zeros is 1, as transformers' quantizer has it.

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
    """What is said of weights that no scale fits."""
    return UserError(
        f"{name} holds NaN or infinite weights, which FP8 has no scale for; export another checkpoint"
    )


def _quantize_strip(weight: Tensor, scales: Scales) -> tuple[Tensor, Tensor]:
    """The same for whole rows of blocks; a block with a NaN or infinity has such a scale."""
    rows, columns = weight.shape
    padding = (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK)
    padded = torch.nn.functional.pad(weight.float(), padding) if any(padding) else weight.float()
    tiles = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, padded.shape[1] // FP8_BLOCK, FP8_BLOCK)
    largest = tiles.abs().amax((1, 3))
    scale = (largest / LARGEST).clamp_min(SMALLEST_SCALE)
    if scales is Scales.power_of_two:
        scale = _power_of_two(scale)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    quotient = (tiles / scale[:, None, :, None]).clamp_(-LARGEST, LARGEST)
    values = quotient.view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return values, scale


def _power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is at least a positive, normal float32, exactly.

    Adding all ones to the 23 bits of the fraction carries into the exponent unless they were 0.
    """
    bits = scale.view(torch.int32)
    rounded = ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)
    return torch.where(scale.isfinite(), rounded, scale)


def dequantize_blocks(quantized: Tensor, scale: Tensor) -> Tensor:
    """q · s in float32 [rows, columns]."""
    rows, columns = quantized.shape
    spread = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return quantized.float() * spread


def blocks(size: int) -> int:
    """Blocks along a dimension, the last of which may be smaller."""
    return -(-size // FP8_BLOCK)
