"""The block quantizer against its definition in exact arithmetic, and E4M3 against an enumeration."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from opo_megatron.config.choices import FP8_BLOCK
from opo_megatron.errors import UserError
from opo_megatron.kernels import fp8
from opo_megatron.kernels.fp8 import LARGEST, Scales, blocks, dequantize_blocks, quantize_blocks

GRID = sorted(
    {Fraction(m, 512) for m in range(8)}
    | {Fraction(8 + m, 8) * Fraction(2) ** e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
)
"""All non-negative E4M3 values, from the definition: 3 mantissa bits, bias 7, at most 448."""
FLOAT32_MAX = float(np.finfo(np.float32).max)


def nearest(value: Fraction) -> Fraction:
    """The nearest E4M3 value; ties go to the one with an even last bit."""
    sign, size = (-1 if value < 0 else 1), abs(value)
    right = min(bisect.bisect_left(GRID, size), len(GRID) - 1)
    left = max(0, right - 1)
    if size >= GRID[right]:
        return sign * GRID[right]
    below, above = size - GRID[left], GRID[right] - size
    if below == above:
        return sign * GRID[left if left % 2 == 0 else right]  # the index is the code
    return sign * GRID[left if below < above else right]


def float32(value: float) -> float:
    """The nearest float32 of a float64 quotient or product of float32 numbers, as hardware rounds."""
    return float(np.float32(value))


def power_below(value: float) -> float:
    """The largest power of two that is not above, down to float32's smallest normal number."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


def factor_of(largest: float, dtype: torch.dtype, scales: Scales) -> float:
    """Transformer Engine's factor of a block, in float64 with every rounding written out."""
    if largest == 0:
        return 1.0
    factor = 448.0 / largest
    factor = float32(factor) if factor < FLOAT32_MAX else torch.finfo(dtype).max
    return power_below(factor) if scales is Scales.power_of_two else factor


def reference(weight: Tensor, scales: Scales) -> tuple[list[list[Fraction]], list[list[float]]]:
    """Reference implementation, element by element: E4M3 values, and scales in float32."""
    rows, columns = weight.shape
    values = [[Fraction(0)] * columns for _ in range(rows)]
    scale_rows = []
    for top in range(0, rows, FP8_BLOCK):
        scale_rows.append([])
        for left in range(0, columns, FP8_BLOCK):
            block = weight[top : top + FP8_BLOCK, left : left + FP8_BLOCK].double()
            factor = factor_of(float(block.abs().max()), weight.dtype, scales)
            scale_rows[-1].append(float32(1 / factor))
            for i, row in enumerate(block.tolist()):
                for j, element in enumerate(row):
                    values[top + i][left + j] = nearest(Fraction(float32(element * factor)))
    return values, scale_rows


def fractions(tensor: Tensor) -> list[list[Fraction]]:
    return [[Fraction(v) for v in row] for row in tensor.double().tolist()]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Weights of all magnitudes, so that normal and subnormal numbers, ties and signs all occur."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-16, 3, (rows, columns), generator=generator).double())
    return (torch.randn(rows, columns, generator=generator).double() * spread).to(dtype)


def test_the_grid_equals_torchs_e4m3() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert [Fraction(v) for v in codes.tolist()] == GRID
    assert float(GRID[-1]) == LARGEST == torch.finfo(torch.float8_e4m3fn).max


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_to_nearest_and_ties_to_even(sign: int) -> None:
    """All values of the format, all midpoints, and their neighbours in float32."""
    points = [float(v) for v in GRID] + [float((a + b) / 2) for a, b in pairwise(GRID)]
    values = [np.float32(v) for v in points]
    values += [np.nextafter(v, np.float32(s)) for v in values for s in (0, 448)]
    row = torch.tensor([[sign * float(v) for v in values] + [448.0]])
    got, scale = [], []
    for part in row.split(FP8_BLOCK - 1, 1):  # 448 in every block makes its scale 1
        q, s = quantize_blocks("w", torch.cat((part, torch.tensor([[448.0]])), 1))
        got += fractions(q)[0][:-1]
        scale += s.flatten().tolist()
    assert set(scale) == {1.0}
    assert got == [nearest(Fraction(v)) for v in row[0].double().tolist()]


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (127, 129), (150, 20)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_element_equals_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, scales: Scales
) -> None:
    weight = matrix(*shape, dtype)
    quantized, scale = quantize_blocks("w", weight, scales)
    assert (quantized.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scale.shape == (blocks(shape[0]), blocks(shape[1]))
    values, expected = reference(weight, scales)
    assert scale.tolist() == expected
    assert fractions(quantized) == values


@pytest.mark.parametrize("strip", [1, 2**15, 2**22])
def test_the_strip_size_does_not_change_the_result(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(700, 300)
    expected = quantize_blocks("w", weight)
    monkeypatch.setattr(fp8, "STRIP_ELEMENTS", strip)
    for got, same in zip(quantize_blocks("w", weight), expected, strict=True):
        assert torch.equal(got.view(torch.uint8), same.view(torch.uint8))


def test_the_largest_weight_of_a_block_takes_the_largest_value() -> None:
    for seed in range(20):
        weight = matrix(256, 384, seed=seed) * 10.0 ** (seed - 10)
        quantized, _ = quantize_blocks("w", weight)
        tiles = quantized.float().view(2, FP8_BLOCK, 3, FP8_BLOCK).transpose(1, 2).flatten(2)
        positions = (
            weight.view(2, FP8_BLOCK, 3, FP8_BLOCK).transpose(1, 2).flatten(2).abs().argmax(2, keepdim=True)
        )
        assert bool((tiles.abs().gather(2, positions) == LARGEST).all())


@pytest.mark.parametrize("scales", Scales)
def test_the_dequantization_error_is_at_most_half_a_step(scales: Scales) -> None:
    weight = matrix(300, 500)
    quantized, scale = quantize_blocks("w", weight, scales)
    exact, back = weight.double(), dequantize_blocks(quantized, scale).double()
    spread = scale.double().repeat_interleave(FP8_BLOCK, 0)[:300].repeat_interleave(FP8_BLOCK, 1)[:, :500]
    normal = exact.abs() >= 2.0**-6 * spread
    rounding = 1 + 2.0**-21  # rounding of scale, quotient and product in float32
    assert bool(normal.any()) and bool((~normal).any())
    error = (back - exact).abs()
    assert bool((error[normal] <= 2.0**-4 * exact.abs()[normal] * rounding).all())
    assert bool((error[~normal] <= 2.0**-10 * spread[~normal] * rounding).all())


def test_power_of_two_scales_are_the_smallest_without_overflow() -> None:
    """Also for a maximum one bit above 448 · 2ᵏ, which must take the next power."""
    maxima = [448.0 * 2.0**k for k in (-60, -7, 0, 5)]
    maxima = [float(np.nextafter(np.float32(m), np.float32(s))) for m in maxima for s in (0, m, 1e30)]
    for largest in [*maxima, 1e-30, 0.3, 3e38]:
        weight = torch.full((3, 5), largest)
        quantized, scale = quantize_blocks("w", weight, Scales.power_of_two)
        mantissa, _ = np.frexp(scale.item())
        assert mantissa == 0.5
        assert Fraction(largest) <= 448 * Fraction(scale.item()) < 2 * Fraction(largest)
        assert bool(quantized.float().isfinite().all()) and float(quantized.float().max()) >= LARGEST / 2


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("largest", [0.0, 1e-40, 1e-38, 1.3e-36, 1.4e-36, 7.0, 3e38])
def test_blocks_whose_factor_leaves_float32_follow_transformer_engine(
    largest: float, dtype: torch.dtype, scales: Scales
) -> None:
    weight = torch.zeros(FP8_BLOCK, 2 * FP8_BLOCK, dtype=dtype)
    weight[5, :4] = largest * torch.tensor([1.0, -0.5, 0.3, 0.01])
    quantized, scale = quantize_blocks("w", weight, scales)
    values, expected = reference(weight, scales)
    assert scale.tolist() == expected and expected[0][1] == 1
    assert fractions(quantized) == values


@pytest.mark.parametrize("scales", Scales)
def test_factors_and_scales_are_rounded_once(scales: Scales) -> None:
    """448 times a reciprocal, which rounds twice, is off by one bit in a quarter of the blocks."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(200, generator=generator) * 10
    weight = torch.zeros(FP8_BLOCK, len(largest) * FP8_BLOCK)
    weight[0, ::FP8_BLOCK] = largest
    _, scale = quantize_blocks("w", weight, scales)
    expected = [float32(1 / factor_of(value, torch.float32, scales)) for value in largest.tolist()]
    assert scale[0].tolist() == expected


def test_dividing_by_the_scale_would_give_other_bytes() -> None:
    """Weights of the policy's type whose exact quotients are ties, which the rounded factor decides."""
    ties = [float((a + b) / 2) for a, b in pairwise(GRID) if a >= Fraction(1, 8)]
    weight = torch.zeros(FP8_BLOCK, FP8_BLOCK)
    weight[0, : len(ties)], weight[0, -1] = 7 / 64 * torch.tensor(ties), 49.0
    assert torch.equal(weight.bfloat16().float(), weight)
    quantized, _ = quantize_blocks("w", weight.bfloat16())
    assert fractions(quantized) == reference(weight.bfloat16(), Scales.fp32)[0]
    divided = (weight / (weight.max() / LARGEST)).to(torch.float8_e4m3fn)
    assert fractions(divided)[0][: len(ties)] == [nearest(Fraction(v)) for v in ties]
    assert 0 < int((divided.view(torch.uint8) != quantized.view(torch.uint8)).sum()) < len(ties)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scales", Scales)
def test_non_finite_weights_are_refused_by_name(bad: float, scales: Scales) -> None:
    weight = matrix(300, 200)
    weight[290, 199] = bad
    with pytest.raises(UserError, match=r"model\.x\.weight holds NaN or infinite weights"):
        quantize_blocks("model.x.weight", weight, scales)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_of_whole_blocks_has_the_bytes_of_the_unsharded_weight(dim: int) -> None:
    weight = matrix(512, 512)
    quantized, scale = quantize_blocks("w", weight)
    for size, same in ((2, True), (4, True), (8, False)):
        parts = [quantize_blocks("w", part.contiguous()) for part in weight.chunk(size, dim)]
        joined = torch.cat([q.view(torch.uint8) for q, _ in parts], dim)
        assert torch.equal(joined, quantized.view(torch.uint8)) is same
        if same:
            assert torch.equal(torch.cat([s for _, s in parts], dim), scale)


def test_a_non_contiguous_view_is_quantized_as_its_copy() -> None:
    weight = matrix(200, 150).t()
    for got, same in zip(
        quantize_blocks("w", weight), quantize_blocks("w", weight.contiguous()), strict=True
    ):
        assert torch.equal(got.view(torch.uint8), same.view(torch.uint8))
