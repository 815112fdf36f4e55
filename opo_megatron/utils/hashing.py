"""splitmix64 (Steele et al. 2014), the hash of random numbers and digests.

Two equal implementations: Python integers, and tensors in int64 arithmetic, which wraps around.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that start no rank do not load torch
    from torch import Tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def hash_of(parts: tuple[int, ...]) -> int:
    """Signed 64-bit hash of a tuple of integers."""
    state = 0
    for part in parts:
        state = mix((state ^ (part & MASK)) + GOLDEN & MASK)
    return signed(state)


def hash_of_text(text: str) -> int:
    """Signed 64-bit hash of a text."""
    content = text.encode()
    words = (int.from_bytes(content[i : i + 8], "little") for i in range(0, len(content), 8))
    return hash_of((len(content), *words))


def mix(x: int) -> int:
    """The splitmix64 finalizer of an unsigned 64-bit integer."""
    x = (x ^ (x >> 30)) * FACTORS[0] & MASK
    x = (x ^ (x >> 27)) * FACTORS[1] & MASK
    return x ^ (x >> 31)


def mix_tensor(x: Tensor) -> Tensor:
    """`mix` of every element of an int64 tensor, in place."""
    for bits, factor in ((30, FACTORS[0]), (27, FACTORS[1])):
        x ^= shift_right(x, bits)
        x *= signed(factor)
    x ^= shift_right(x, 31)
    return x


def signed(x: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return x - (1 << 64) if x >> 63 else x


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
