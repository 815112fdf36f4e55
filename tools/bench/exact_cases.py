"""The kernels of exact mode as they are launched, with the bytes and operations that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from bench.compiled import Case

from opo_megatron.kernels import triton_exact_attention as attention
from opo_megatron.kernels import triton_exact_attention_backward as attention_backward
from opo_megatron.kernels import triton_exact_linear as linear
from opo_megatron.kernels import triton_exact_rows as rows

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTEGERS = ("table", "query_starts", "key_lengths", "positions")
SCALARS = ("factor", "scale", "eps", "sign")
IN_FLOAT32 = ("log_sums", "deltas", "part_sums", "part_mixed", "temperatures", "log_probs", "probabilities")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model (here Qwen3-8B's), and of a call."""

    hidden: int = 4096
    ffn: int = 12288
    heads: int = 32
    groups: int = 8
    head_dim: int = 128
    vocabulary: int = 151936
    rows: int = 8192
    """Rows of a training pass, in sequences of `keys` tokens; `keys / 8` requests decode at once."""
    keys: int = 2048


@dataclass(frozen=True)
class Counted:
    """A case, and what one launch at least reads and writes, and computes."""

    case: Case
    bytes: float
    operations: float


def _case(kernel: Any, dtype: str, constants: dict[str, Any], options: dict[str, Any], **types: str) -> Case:
    """The case with the types of arguments by their names; the others are tensors of `dtype`."""
    known = dict.fromkeys(INTEGERS, "*i32") | dict.fromkeys(SCALARS, "fp32")
    known |= dict.fromkeys(IN_FLOAT32, "*fp32") | {"uniforms": "*fp64", "tokens": "i32", "splits": "i32"}
    known |= dict.fromkeys((*attention._UNSPECIALIZED, "rows", "row_tiles", "programs"), "i32") | types
    return Case(kernel, {name: known.get(name, f"*{dtype}") for name in kernel.arg_names}, constants, options)


def cases(dtype: str = "bf16", shape: Shape | None = None) -> dict[str, Counted]:
    """Every kernel by name."""
    s = shape or Shape()
    return _attention_cases(dtype, s) | _linear_cases(dtype, s) | _row_cases(dtype, s)


def _attention_cases(dtype: str, s: Shape) -> dict[str, Counted]:
    options = {
        "num_warps": attention.WARPS, "num_stages": attention.STAGES, "enable_fp_fusion": False,
    }  # fmt: skip
    sizes = attention.constants(s.heads, s.groups, s.head_dim) | {"HAS_POSITIONS": False}
    item, width = TYPES[dtype].itemsize, s.heads * s.head_dim
    requests = s.keys // 8
    cached = 2.0 * s.groups * s.head_dim * item
    trained = s.rows * (2 * width * item + cached)
    products = 2 * s.rows * s.keys / 2 * 2 * width
    partial = -(-s.keys // attention.SPLIT) * requests * s.heads * (s.head_dim + 2) * 4
    found = {}
    for name, is_split, n_bytes, operations in (
        ("attention, training", False, trained, products),
        ("attention, decode", False, requests * s.keys * cached, 4.0 * requests * s.keys * width),
        (
            "attention, decode in splits",
            True,
            requests * s.keys * cached + partial,
            4.0 * requests * s.keys * width,
        ),
    ):
        constants = sizes | {"BLOCK": attention.BLOCK, "UNIT": 8, "IS_SPLIT": is_split}
        found[name] = Counted(_case(attention._kernel, dtype, constants, options), n_bytes, operations)
    merge = _case(attention._merge_kernel, dtype, sizes, options)
    found["attention, merge of splits"] = Counted(merge, partial + requests * width * item, partial)
    constants = {
        "HEADS": s.heads, "GROUPS": s.groups, "D": s.head_dim,
        "PADDED_D": max(16, triton.next_power_of_2(s.head_dim)),
        "BLOCK": attention_backward.BLOCKS[TYPES[dtype]], "HAS_POSITIONS": False,
    }  # fmt: skip
    options = {"num_warps": attention_backward.WARPS, "num_stages": attention_backward.STAGES}
    for name, kernel, share in (
        ("attention, gradient of keys and values", attention_backward._key_kernel, 2.0),
        ("attention, gradient of queries", attention_backward._query_kernel, 1.5),
    ):
        found[name] = Counted(_case(kernel, dtype, constants, options), 2 * trained, share * products)
    return found


def _linear_cases(dtype: str, s: Shape) -> dict[str, Counted]:
    launch, item = linear.BLOCKS[TYPES[dtype]], TYPES[dtype].itemsize
    blocks = {name: value for name, value in launch.items() if name.isupper()} | {"BAND": linear.BAND}
    options = {name: value for name, value in launch.items() if not name.isupper()} | {
        "enable_fp_fusion": False
    }
    found = {}
    for name, columns, width, parts in (
        ("linear, gate and up", 2 * s.ffn, s.hidden, 1),
        ("linear, down", s.hidden, s.ffn, 1),
        ("linear, down in two parts", s.hidden, s.ffn, 2),
        ("LM head", s.vocabulary, s.hidden, 1),
    ):
        is_wide = parts > 1 or name == "LM head"
        case = _case(
            linear._kernel, dtype, blocks | {"K": width, "N": columns, "PARTS": parts}, options,
            product="*fp32" if is_wide else f"*{dtype}",
        )  # fmt: skip
        written = parts * s.rows * columns * (4 if is_wide else item)
        n_bytes = item * width * (s.rows + columns) + written
        found[name] = Counted(case, n_bytes, 2.0 * s.rows * columns * width)
    return found


def _row_cases(dtype: str, s: Shape) -> dict[str, Counted]:
    item, n = TYPES[dtype].itemsize, s.rows
    norm = {"WIDTH": s.hidden, "PADDED": triton.next_power_of_2(s.hidden)}
    half = s.head_dim // 2
    heads = {
        "HEADS": s.heads, "HALF": half, "PADDED": triton.next_power_of_2(half),
        "HEADS_BLOCK": rows.HEADS_BLOCK,
    }  # fmt: skip
    gated = {"WIDTH": s.ffn, "BLOCK": rows.BLOCK}
    over = {"WIDTH": s.vocabulary, "BLOCK": rows.VOCABULARY_BLOCK}
    listed: list[tuple[str, Any, dict[str, Any], dict[str, str], float, float]] = [
        ("norm", rows._norm_kernel, norm | {"HAS_RESIDUAL": False}, {}, 2 * item * s.hidden, 4 * s.hidden),
        ("norm of a sum", rows._norm_kernel, norm | {"HAS_RESIDUAL": True}, {},
         4 * item * s.hidden, 5 * s.hidden),
        ("rotary", rows._rotary_kernel, heads, {},
         2 * item * (s.heads + 1) * s.head_dim, 3 * s.heads * s.head_dim),
        ("SwiGLU", rows._swiglu_kernel, gated, {}, 3 * item * s.ffn, 5 * s.ffn),
        ("SwiGLU, gradient", rows._swiglu_gradient_kernel, gated, {}, 5 * item * s.ffn, 10 * s.ffn),
        ("log-softmax", rows._log_softmax_kernel, over, {"logits": "*fp32"},
         12 * s.vocabulary, 8 * s.vocabulary),
        ("sampling", rows._inverse_cdf_kernel, over, {"tokens": "*i64"}, 8 * s.vocabulary, 6 * s.vocabulary),
    ]  # fmt: skip
    return {
        name: Counted(_case(kernel, dtype, constants, rows.OPTIONS, **types), n * n_bytes, n * operations)
        for name, kernel, constants, types, n_bytes, operations in listed
    }
