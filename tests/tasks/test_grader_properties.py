"""The readers of numbers and mathematics, with 100,000 examples, against Decimal, Fraction and SymPy.

What is accepted is never what these prove different; what they write in another way is accepted.
"""

from __future__ import annotations

import string
from decimal import Decimal
from fractions import Fraction

import pytest
import sympy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opo_megatron.tasks.math_answers import grade
from opo_megatron.tasks.verifiers import last_number

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def examples(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def boxed(answer: str) -> str:
    return rf"So $\boxed{{{answer}}}$."


decimals = st.decimals(min_value=-(10**12), max_value=10**12, places=6).map(
    lambda value: value.normalize() + 0
)
fractions = st.fractions(min_value=-1000, max_value=1000, max_denominator=60)


@st.composite
def written_decimals(draw: st.DrawFn) -> tuple[Decimal, str]:
    """A number, and one way to write it in a sentence."""
    value = draw(decimals)
    style = draw(st.sampled_from(["plain", "commas", "thin", "scientific", "power", "minus"]))
    text = f"{value:f}"
    if style in ("commas", "thin"):
        text = f"{value:,f}".replace(
            ",", "," if style == "commas" else draw(st.sampled_from("\u2009\u202f\u00a0"))
        )
    elif style in ("scientific", "power"):
        text = f"{value:e}"
        if style == "power":
            mantissa, _, exponent = text.partition("e")
            text = f"{mantissa} × 10^{{{int(exponent)}}}"
    elif style == "minus":
        text = text.replace("-", "−")
    before = draw(st.sampled_from(["", "It is ", "x = ", "1, 2 and ", "$", "from 3 to ", "(", "7\n"]))
    behind = draw(st.sampled_from(["", ".", " apples", ")", "!", "\n", "$", ", of course"]))
    return value, before + text + behind


@examples(40_000)
@given(written_decimals())
def test_the_last_number_of_a_text_is_what_decimal_says(written: tuple[Decimal, str]) -> None:
    value, text = written
    assert last_number(text) == value


@st.composite
def written_fractions(draw: st.DrawFn, value: Fraction) -> str:
    """One way to write a rational number."""
    above, below = abs(value.numerator), value.denominator
    sign = draw(st.sampled_from(["-", "−"])) if value < 0 else ""
    factor = draw(st.integers(1, 9))
    whole, rest = divmod(above, below)
    ways = [
        rf"\frac{{{factor * above}}}{{{factor * below}}}",
        f"{factor * above}/{below * factor}",
        rf"\dfrac{{{above}}}{{{below}}}",
    ]
    if whole and rest:
        ways += [rf"{whole}\frac{{{rest}}}{{{below}}}", f"{whole} {rest}/{below}"]
    if below == 1:
        ways += [
            str(above),
            f"{above:,}".replace(",", "{,}"),
            f"{above}.0",
            f"{Decimal(above):E}",
            f"x = {sign}{above}",
        ]
    power = next((places for places in range(7) if (value * 10**places).denominator == 1), None)
    if power is not None:
        digits = f"{abs(value * 10**power).numerator:0{power + 1}d}"
        ways.append(f"{digits[: len(digits) - power]}.{digits[len(digits) - power :]}" if power else digits)
    way = draw(st.sampled_from(ways))
    return way if way.startswith("x") else sign + way


@examples(30_000)
@given(st.data(), fractions, fractions, st.booleans())
def test_rational_numbers_are_equal_as_fractions_are(
    data: st.DataObject, one: Fraction, other: Fraction, is_same: bool
) -> None:
    other = one if is_same else other
    gold, answer = data.draw(written_fractions(one)), data.draw(written_fractions(other))
    assert grade(boxed(answer), gold) == float(one == other), (gold, answer)


x, y = sympy.symbols("x y", real=True)
leaves = (
    st.sampled_from([x, y, x, y, sympy.pi, sympy.sqrt(2), sympy.sqrt(3)])
    | st.integers(-9, 9).map(sympy.Integer)
    | fractions.map(lambda value: sympy.Rational(value.numerator % 20, value.denominator))
)


def deeper(children: st.SearchStrategy) -> st.SearchStrategy:
    pairs = st.tuples(children, children)
    return (
        pairs.map(lambda pair: pair[0] + pair[1])
        | pairs.map(lambda pair: pair[0] * pair[1])
        | pairs.map(lambda pair: pair[0] - pair[1])
        | children.map(lambda child: child**2)
        | children.map(sympy.sin)
        | children.map(lambda child: sympy.sqrt(child**2 + 1))
        | children.map(lambda child: 1 / (child**2 + 2))
    )


expressions = st.recursive(leaves, deeper, max_leaves=5)


def differs(difference: sympy.Expr) -> bool:
    """Whether SymPy proves an expression not to be 0.

    Its `equals` is wrong about some sums of π that cancel, so that a value at a point must confirm it.
    """
    value = difference.subs({x: sympy.Rational(3, 7), y: sympy.Rational(5, 11)}).evalf(60, maxn=400)
    return difference.equals(0) is False and bool(abs(value) > sympy.Float(10) ** -40)


REWRITINGS = [
    sympy.expand,
    sympy.factor,
    sympy.together,
    lambda e: e + 1,
    lambda e: -e,
    lambda e: 2 * e,
    lambda e: e.subs(x, y),
]


@examples(15_000)
@given(expressions, expressions, st.sampled_from([*REWRITINGS, None]))
def test_nothing_is_accepted_that_sympy_proves_different(
    gold: sympy.Expr, other: sympy.Expr, rewrite: object
) -> None:
    answer = other if rewrite is None else rewrite(gold)  # type: ignore[operator]
    texts = sympy.latex(gold), sympy.latex(answer)
    if grade(boxed(texts[1]), texts[0]):
        assert not differs(gold - answer), texts
    elif rewrite in REWRITINGS[:3] and len(max(texts, key=len)) < 900:
        raise AssertionError(f"{texts[1]} was refused for {texts[0]}")


PIECES = [
    r"\frac{", r"\sqrt{", "^{", "}", "{", "(", ")", "[", "]", r"\left(", r"\right)", "9", "12", "0.5", "!",
    r"\boxed{", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", "x", "AB", r"\text{", r"\text{ or }",
    "\x00",
    "é", "甲", "½", "√", "²", r"\int", r"\sum_{n=1}^{", "e^", r"\infty", ",", ", ", "=", "<", r"\le ",
    "$", r"\%",
    "%", r"\pm", r"\cup", r"\in ", r"\{", r"\}", ":", "/", "-", "+", r"\cdot", "e", "i", r"\ldots", " ", "_",
    "cm", "(C) ", r"\log", r"\sin", "|", "°",
]  # fmt: skip
hostile = (
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
    | st.text(string.printable, max_size=20)
    | st.text(max_size=10)
)


@examples(15_000)
@given(hostile, hostile)
def test_no_text_crashes_the_readers(one: str, other: str) -> None:
    verdicts = grade(boxed(one), other), grade(boxed(other), one)
    assert set(verdicts) <= {0.0, 1.0}
    last_number(one)
