"""Matrix products of exact mode (Triton): one persistent kernel with fixed blocks.

Each program computes tiles of `ROWS` × `COLUMNS` results, one after another.  A result's sum over K is in
float32, in blocks from 0 upwards, and rounded once.  Neither the number of rows nor a row's place in the
batch changes the product that computes it: a last tile is padded by zeros, and sizes of the weight are
constants of the compiled kernel.  Bfloat16 takes tensor cores, float32 none (TF32 would round the operands).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opo_megatron.kernels.triton_exact_attention import aligned

BLOCKS = {
    torch.bfloat16: {"ROWS": 128, "COLUMNS": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 4},
    torch.float32: {"ROWS": 64, "COLUMNS": 64, "BLOCK": 16, "num_warps": 8, "num_stages": 3},
}
"""Rows and columns of a tile, its block of K, and the launch, by the type of the operands."""
BAND = 8
"""Tiles of rows that share a tile of columns while it is in the cache."""
INTERPRETER_PROGRAMS = 2
"""Persistent programs where there is no GPU."""


@triton.jit(do_not_specialize=("rows", "row_tiles", "programs"))
def _kernel(
    x, weight, product, rows, row_tiles, programs,
    K: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    size: tl.constexpr = K // PARTS
    tiles = row_tiles * column_tiles
    for number in range(tl.program_id(0), tiles * PARTS, programs):
        part, tile = number // tiles, number % tiles
        band = tile // (BAND * column_tiles)
        height = tl.minimum(row_tiles - band * BAND, BAND)
        within = tile % (BAND * column_tiles)
        row = (band * BAND + within % height) * ROWS + tl.arange(0, ROWS)
        column = within // height * COLUMNS + tl.arange(0, COLUMNS)
        term = tl.arange(0, BLOCK)
        x_rows = x + row.to(tl.int64)[:, None] * K + part * size
        weight_rows = weight + column.to(tl.int64)[:, None] * K + part * size
        is_row, is_column = (row < rows)[:, None], (column < N)[:, None]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, size, BLOCK):
            k = first + term[None, :]
            if size % BLOCK == 0:
                a = tl.load(x_rows + k, mask=is_row, other=0.0)
                b = tl.load(weight_rows + k, mask=is_column, other=0.0)
            else:
                a = tl.load(x_rows + k, mask=is_row & (k < size), other=0.0)
                b = tl.load(weight_rows + k, mask=is_column & (k < size), other=0.0)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        place = (part.to(tl.int64) * rows + row)[:, None] * N + column[None, :]
        tl.store(product + place, total.to(product.dtype.element_ty), mask=is_row & (column < N)[None, :])


def matmul(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x Wᵀ: [n, K], [N, K] of one type → [n, N]; float32 sums, rounded once."""
    return _launch(x, weight, 1, out_dtype)[0]


def partial_matmul(x: Tensor, weight: Tensor, parts: int) -> Tensor:
    """[n, K], [N, K] → [parts, n, N] float32, over equal parts of K."""
    return _launch(x, weight, parts, torch.float32)


def _launch(x: Tensor, weight: Tensor, parts: int, out_dtype: torch.dtype) -> Tensor:
    x, weight = aligned(x), aligned(weight)
    (rows, width), columns = x.shape, weight.shape[0]
    product = x.new_empty(parts, rows, columns, dtype=out_dtype)
    if rows == 0:
        return product
    launch = BLOCKS[x.dtype]
    row_tiles = triton.cdiv(rows, launch["ROWS"])
    tiles = row_tiles * triton.cdiv(columns, launch["COLUMNS"]) * parts
    programs = min(tiles, _programs(x.device))
    _kernel[(programs,)](
        x, weight, product, rows, row_tiles, programs,
        K=width, N=columns, PARTS=parts, BAND=BAND, enable_fp_fusion=False, **launch,
    )  # fmt: skip
    return product


@cache
def _programs(device: torch.device) -> int:
    """One per multiprocessor."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count)
