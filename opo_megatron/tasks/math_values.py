"""Values of mathematical expressions: exact rational numbers, else real or complex ones of 1000 digits.

Rational numbers stay exact up to BITS bits.  A value that became complex on its way (the square root of a
negative number) stays complex in all that follows, so that the type of a result tells whether the expression
left the real numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeAlias

from mpmath import mp, mpc, mpf

Value: TypeAlias = Any
"""Fraction, mpf or mpc; mpmath has no type hints."""

DIGITS = 1000
TOLERANCE = mpf(10) ** -950
"""Relative difference of equal values; DIGITS leaves 50 for rounding."""
BITS = 50_000
"""Largest exact number; larger ones are rounded."""
LARGEST_FACTORIAL = 4000


class Undefined(Exception):
    """The expression has no value at a point."""


def same_value(one: Value, other: Value) -> bool:
    """Whether two values are equal: exactly where both are rational, else up to rounding."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    with mp.workdps(DIGITS):
        first, second = rounded(one), rounded(other)
        if not (mp.isfinite(first) and mp.isfinite(second)):
            return bool(first == second)
        scale = 1 if first == 0 or second == 0 else max(abs(first), abs(second))
        return bool(abs(first - second) <= TOLERANCE * scale)


def rounded(value: Value) -> mpf | mpc:
    return mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _real(
    function: Callable[[Value], Value], low: int | None = None, high: int | None = None
) -> Callable[[Value], Value]:
    """A function whose values beyond `low` and `high` are complex."""

    def apply(value: Value) -> Value:
        argument = rounded(value)
        if not isinstance(value, mpc) and (
            (low is not None and value < low) or (high is not None and value > high)
        ):
            argument = mpc(argument)
        return function(argument)

    return apply


_ENTIRE = ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "exp")
FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    **{name: _real(getattr(mp, name)) for name in _ENTIRE},
    "arcsin": _real(mp.asin, -1, 1),
    "arccos": _real(mp.acos, -1, 1),
    "arctan": _real(mp.atan),
    "ln": _real(mp.log, 0),
}


def number_of(kind: str, text: str) -> Fraction:
    r"""The value of a number by its notation: `1.5`, scientific `1.5e3`, repeating `0.1\overline{6}`."""
    if kind == "repeating":
        start, period = re.split(r"\\[a-z]+\{|\(", text.rstrip("})"))
        whole, _, decimals = start.partition(".")
        nines = (10 ** len(period) - 1) * 10 ** len(decimals)
        return Fraction((whole or "0") + "." + (decimals or "0")) + Fraction(int(period), nines)
    if kind == "scientific":
        mantissa, _, exponent = text.lower().partition("e")
        if abs(int(exponent)) > BITS // 4:
            raise Undefined
        return Fraction(mantissa if mantissa[-1:] != "." else mantissa + "0") * Fraction(10) ** int(exponent)
    return Fraction(text.removesuffix(".") if text != "." else "0")


def _operands(left: Value, right: Value) -> tuple[Value, Value]:
    exact = isinstance(left, Fraction) and isinstance(right, Fraction)
    return (left, right) if exact else (rounded(left), rounded(right))


def add(left: Value, right: Value) -> Value:
    one, other = _operands(left, right)
    return one + other


def subtract(left: Value, right: Value) -> Value:
    one, other = _operands(left, right)
    return one - other


def multiply(left: Value, right: Value) -> Value:
    one, other = _operands(left, right)
    return _bounded(one * other)


def divide(left: Value, right: Value) -> Value:
    one, other = _operands(left, right)
    if other == 0:
        raise Undefined
    return _bounded(one / other)


def _bounded(value: Value) -> Value:
    return rounded(value) if isinstance(value, Fraction) and _bits(value) > BITS else value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def power(base: Value, exponent: Value) -> Value:
    """Complex where a negative base has a broken exponent."""
    is_whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if not isinstance(exponent, mpc) and ((base == 0 and exponent <= 0) or abs(exponent) > 10**12):
        raise Undefined
    if isinstance(base, Fraction) and is_whole and _bits(base) * abs(exponent) <= BITS:
        return base**exponent.numerator
    if not isinstance(base, mpc) and base < 0 and not is_whole:
        return mpc(rounded(base)) ** rounded(exponent)
    return rounded(base) ** rounded(exponent)


def root(value: Value, degree: Value) -> Value:
    """The real root; of a negative number with an even degree, the principal one, which is complex."""
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 1000:
        raise Undefined
    if isinstance(value, mpc):
        return value ** (mpf(1) / degree.numerator)
    if value < 0:
        if degree.numerator % 2 == 0:
            return mpc(rounded(value)) ** (mpf(1) / degree.numerator)
        return -root(-value, degree)
    found = mp.root(rounded(value), degree.numerator)
    if isinstance(value, Fraction):
        nearest = Fraction(int(mp.nint(found * value.denominator)), value.denominator)
        if nearest**degree.numerator == value:
            return nearest
    return found


def factorial(value: Value) -> Value:
    """Γ(n + 1), so that identities of factorials hold at every point; exact for whole numbers."""
    if not isinstance(value, Fraction) or abs(value) > 10**6:
        raise Undefined
    if value.denominator != 1 or value < 0:
        return mp.gamma(rounded(value) + 1)
    exact = value <= LARGEST_FACTORIAL
    return Fraction(math.factorial(value.numerator)) if exact else mp.factorial(value.numerator)


def binomial(upper: Value, lower: Value) -> Value:
    if not (isinstance(upper, Fraction) and isinstance(lower, Fraction)):
        raise Undefined
    if upper.denominator != 1 or lower.denominator != 1 or not 0 <= lower <= upper or upper > 10**4:
        return mp.binomial(rounded(upper), rounded(lower))
    return _bounded(Fraction(math.comb(upper.numerator, lower.numerator)))


def absolute(value: Value) -> Value:
    return mpc(abs(value)) if isinstance(value, mpc) else abs(value)


def floor(value: Value) -> Value:
    if isinstance(value, mpc):
        raise Undefined
    return Fraction(value.numerator // value.denominator) if isinstance(value, Fraction) else mp.floor(value)
