"""Products of bfloat16 in Triton's interpreter: it multiplies the 16 bits of each number as an integer.

Imported by a test that runs in the interpreter, before its kernels run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _as_float32(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = operand.data.view(np.uint16).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


_dot = InterpreterBuilder.create_dot


def _create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, _as_float32(a), _as_float32(b), *rest)


InterpreterBuilder.create_dot = _create_dot
