"""Tensors of several shapes and types in one buffer of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from opo_megatron.weights.safetensors_file import TensorInfo

ALIGNMENT = 16
"""Bytes; SGLang's kernels require it of their operands, and it is larger than any element."""


def bytes_of(infos: Sequence[TensorInfo]) -> int:
    """Size of a buffer for these tensors."""
    return sum(map(_aligned, infos))


def views_of(buffer: Tensor, infos: Sequence[TensorInfo]) -> list[Tensor]:
    """The tensors, one after the other."""
    begins = [0, *accumulate(map(_aligned, infos))]
    return [
        buffer[begin : begin + info.nbytes].view(info.dtype).view(info.shape)
        for begin, info in zip(begins, infos, strict=False)
    ]


def _aligned(info: TensorInfo) -> int:
    return -(-info.nbytes // ALIGNMENT) * ALIGNMENT
