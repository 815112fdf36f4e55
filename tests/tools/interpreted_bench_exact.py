"""The pairs of calls that bench_exact.py times on a GPU compute the same, in Triton's interpreter.

Run by test_bench_exact.py, which sets TRITON_INTERPRET=1 and OPO_EXACT_TRITON=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench.exact_kernels import SHAPES, Shape, cases
from torch import Tensor

from tests.support import interpreter_bf16 as interpreter_bf16

TINY = Shape(32, 48, 2, 1, 16, 70, training=(2, 9), decoding=((1, 5), (3, 40)))
CPU = torch.device("cpu")


def library(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return attend


CASES = cases(TINY, CPU, library)


def flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.detach().double().flatten() for part in parts])


@pytest.mark.parametrize("name", CASES)
def test_both_calls_of_a_case_compute_the_same(name: str) -> None:
    ours, theirs = (flat(call()) for call in CASES[name]())
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_every_operation_of_a_model_is_timed_at_every_size() -> None:
    for shape in SHAPES.values():
        names = " ".join(cases(shape, CPU, library))
        for words in ("product, gate and up, 256 rows", "LM head", "sampling", "rotary", "256 × 512 keys"):
            assert words in names
