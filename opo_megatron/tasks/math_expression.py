r"""Mathematical expressions as functions that can be evaluated, and whether two of them are equal.

    expression ::= sum                     x^2 - \frac{1}{2}
    sum        ::= product ((+ | -) product)*
    product    ::= power ((\cdot | / | nothing) power)*
    power      ::= atom (^ exponent | ! | ^\circ)*

Two expressions are equal if they agree at points where both are defined.  Rational functions are evaluated at
rational points in exact arithmetic, so that agreement at random points proves an identity up to a negligible
probability (Schwartz–Zippel); all else is evaluated to 1000 digits.  Without `i`, the domain is the
real numbers: \sqrt{x^2} is not x, and \sqrt{-1} has no value.

What this grammar does not cover (sums, integrals) is not guessed at: it is `Unreadable`.  So is what can be
read in two ways: `1/ab`, `x 2`, `2^3^4`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import lru_cache
from random import Random
from typing import NamedTuple

from mpmath import mp, mpc, mpf

from opo_megatron.tasks import math_values as values
from opo_megatron.tasks.math_values import DIGITS, FUNCTIONS, Undefined, Value, number_of, rounded, same_value

Point = Mapping[str, Fraction]
Node = Callable[[Point], Value]

POINTS = 12
NEEDED = 3
"""Points at which both sides must be defined."""


class Unreadable(Exception):
    """The text is not an expression of the grammar."""


class Expression(NamedTuple):
    evaluate: Node
    symbols: frozenset[str]
    is_complex: bool


@lru_cache(maxsize=4096)
def read(text: str) -> Expression | None:
    """The expression of a plain text; None where it is not one."""
    try:
        if _AMBIGUOUS.search(text):
            return None
        reader = _Reader(_tokens(_mixed_numbers(text)))
        node = reader.sum()
        reader.expect_end()
    except (Unreadable, RecursionError):
        return None
    return Expression(node, frozenset(reader.symbols), reader.is_complex)


def constant(text: str) -> Value | None:
    """The value of an expression without variables; None for others."""
    expression = read(text)
    if expression is None or expression.symbols:
        return None
    return _value(expression, {})


def same_expression(one: str, other: str) -> bool:
    """Whether two plain texts are expressions that are equal wherever both are defined."""
    return _agree_everywhere(one, other, same_value)


def is_multiple(one: str, other: str, positive: bool) -> bool:
    """Whether one expression is the other times a constant other than 0, which may have to be positive."""
    ratios: list[Value] = []

    def agree(first: Value, second: Value) -> bool:
        if first == 0 or second == 0:
            return first == second
        with mp.workdps(DIGITS):
            exact = isinstance(first, Fraction) and isinstance(second, Fraction)
            ratios.append(first / second if exact else rounded(first) / rounded(second))
        has_sign = isinstance(ratios[0], Fraction | mpf) and ratios[0] > 0
        return same_value(ratios[0], ratios[-1]) and (has_sign or not positive)

    return _agree_everywhere(one, other, agree) and bool(ratios)


def _agree_everywhere(one: str, other: str, agree: Callable[[Value, Value], bool]) -> bool:
    """Whether `agree` holds at all points where both expressions are defined, and these are enough."""
    first, second = read(one), read(other)
    if first is None or second is None:
        return False
    symbols = sorted(first.symbols | second.symbols)
    if first.is_complex or second.is_complex:
        first, second = first._replace(is_complex=True), second._replace(is_complex=True)
    defined, rng = 0, Random(0)
    for index in range(POINTS if symbols else 1):
        point = {name: _coordinate(rng, index) for name in symbols}
        left, right = _value(first, point), _value(second, point)
        if left is None or right is None:
            continue
        if not agree(left, right):
            return False
        defined += 1
    return defined >= (NEEDED if symbols else 1)


def _coordinate(rng: Random, index: int) -> Fraction:
    """Coordinates of both signs, below and above 1, with denominators that no answer has."""
    size = Fraction(rng.randrange(10**6, 10**7), 10_000_019)
    sign = (1, 1, -1)[index % 3] if index < POINTS // 2 else rng.choice((1, -1))
    return sign * (size if index % 2 else 1 + 3 * size)


def _value(expression: Expression, point: Point) -> Value | None:
    """The value at a point; None where it is not defined (in real numbers, without i)."""
    try:
        with mp.workdps(DIGITS):
            value = expression.evaluate(point)
            if isinstance(value, Fraction):
                return value
            if mp.isnan(value):
                return None
            if isinstance(value, mpc):
                if not expression.is_complex:
                    return None
                return value.real if value.imag == 0 else value
            return value
    except (Undefined, ZeroDivisionError, ValueError, OverflowError, RecursionError, TypeError):
        return None


_NUMBER = r"(?:\d+(?:\.\d+)?(?![\d.])|\.\d+|\d+\.(?=\s*(?:$|[-+)\]}])))"
_TOKEN = re.compile(
    rf"\s*(?:(?P<scientific>(?:(?:1|\d*\.\d+)[eE][+-]?|\d+E[+-]?|\d+e)\d+)(?![\d.A-Za-z])"
    rf"|(?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\{{\d+\}}|\d*\.\(\d+\))|(?P<number>{_NUMBER})"
    r"|(?P<symbol>\\(?:overline|vec|hat|bar|tilde|dot|overrightarrow)\{[^{}]*\}|\\text\{\s*[A-Za-z]\s*\})"
    r"|(?P<command>\\[A-Za-z]+|\\\{|\\\})|(?P<letter>[A-Za-z])|(?P<other>\S))"
)
_AMBIGUOUS = re.compile(r"\\frac\{d[^{}]*\}\{d|\.\d+\(\d")
"""Derivatives, and `0.1(6)`, which is 0.6 or one sixth."""
_MIXED = re.compile(
    r"(?<![\d.^_}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}(?![\^!])|(?<![\d.^_}])(\d+) (\d+)/(\d+)(?![\d.^!])"
)


def _mixed_numbers(text: str) -> str:
    r"""`3\frac{1}{2}` and `3 1/2` as sums; an improper fraction makes a product."""

    def spell(match: re.Match[str]) -> str:
        whole, above, below = match.group(1, 2, 3) if match.group(1) else match.group(4, 5, 6)
        if int(above) >= int(below):
            return match.group()
        return rf"({whole}+\frac{{{above}}}{{{below}}})"

    return _MIXED.sub(spell, text)


class Token(NamedTuple):
    kind: str
    text: str


def _tokens(text: str) -> list[Token]:
    found, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise Unreadable(text)
        found.append(Token(match.lastgroup, match.group().strip()))
        position = match.end()
    return found


_GREEK_LETTERS = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron rho
sigma tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega varphi vartheta
varepsilon ell hbar"""
_GREEK = frozenset(_GREEK_LETTERS.split())
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_CALLED = frozenset("fgh")
"""Letters that are functions where a parenthesis follows; what they are is unknown."""
_NUMBERS = frozenset(("number", "scientific", "repeating"))
_LOGARITHMS = frozenset(("log", "lg"))
_STARTING = (
    _GREEK | FUNCTIONS.keys() | _LOGARITHMS | {"frac", "sqrt", "binom", "pi", "infty", "lfloor", "lceil"}
)
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_BASE = "base of log"
"""`\\log` without a base is ln over the ln of an unknown base: an identity must hold for every base."""


class _Reader:
    """Recursive descent over tokens; methods return functions of a point."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position = tokens, 0
        self.symbols: set[str] = set()
        self.is_complex = False

    def peek(self) -> Token:
        return self.tokens[self.position] if self.position < len(self.tokens) else Token("end", "")

    def take(self, *texts: str) -> str | None:
        text = self.peek().text
        if text and text in texts:
            self.position += 1
            return text
        return None

    def expect(self, text: str) -> None:
        if self.take(text) is None:
            raise Unreadable(text)

    def expect_end(self) -> None:
        if self.position < len(self.tokens):
            raise Unreadable(self.peek().text)

    def sum(self) -> Node:
        node = self.product()
        while sign := self.take("+", "-"):
            node = _combine(node, self.product(), values.add if sign == "+" else values.subtract)
        return node

    def product(self) -> Node:
        if sign := self.take("-", "+"):
            node = self.product()
            return _negated(node) if sign == "-" else node
        start = self.position
        node = self.power()
        while True:
            if self.take(r"\cdot"):
                node = _combine(node, self.signed_power(), values.multiply)
            elif self.take("/"):
                is_ratio = all(token.kind == "number" for token in self.tokens[start : self.position - 1])
                denominator = self.position
                node = _combine(node, self.signed_power(), values.divide)
                is_ratio = is_ratio and all(
                    token.kind == "number" for token in self.tokens[denominator : self.position]
                )
                if self.starts_atom() and not is_ratio:
                    raise Unreadable("a product behind a slash")
            elif self.starts_atom():
                if self.peek().kind in _NUMBERS:
                    raise Unreadable("a number behind a factor")
                node = _combine(node, self.power(), values.multiply)
            else:
                return node

    def signed_power(self) -> Node:
        if self.take("-"):
            return _negated(self.signed_power())
        return self.power()

    def starts_atom(self) -> bool:
        kind, text = self.peek()
        if kind == "other":
            return text in "([{"  # a bar may close what is open
        if kind == "command":
            return text[1:] in _STARTING
        return kind != "end"

    def power(self) -> Node:
        node = self.atom()
        raised = False
        while True:
            if self.take("!"):
                node = _unary(node, values.factorial)
                if self.peek().text == "!":
                    raise Unreadable("a double factorial")
            elif self.take("^"):
                if self.tokens[self.position : self.position + 3] == _DEGREE_TOKENS:
                    self.position += 3
                    node = _unary(node, lambda value: rounded(value) * mp.pi / 180)
                    continue
                if raised:
                    raise Unreadable("a power of a power")
                raised = True
                node = _combine(node, self.exponent(), values.power)
            else:
                return node

    def exponent(self) -> Node:
        if self.take("{"):
            node = self.sum()
            self.expect("}")
            return node
        return _negated(self.exponent()) if self.take("-") else self.atom()

    def group(self, opening: str) -> Node:
        self.expect(opening)
        node = self.sum()
        self.expect(_CLOSING[opening])
        return node

    def atom(self) -> Node:
        kind, text = self.peek()
        if kind == "other" or text in _CLOSING:
            if text not in _CLOSING:
                raise Unreadable(text)
            node = self.group(text)
            whole = {
                "|": values.absolute,
                r"\lfloor": values.floor,
                r"\lceil": lambda value: -values.floor(-value),
            }.get(text)
            return node if whole is None else _unary(node, whole)
        self.position += 1
        if kind in _NUMBERS:
            number = number_of(kind, text)
            if self.peek().text == "_":
                raise Unreadable("a number in another base")
            return lambda point: number
        if kind in ("letter", "symbol"):
            return self.symbol(re.sub(r"\\text\{\s*([A-Za-z])\s*\}", r"\1", text))
        if kind == "command":
            return self.command(text[1:])
        raise Unreadable(text)

    def symbol(self, name: str) -> Node:
        if self.take("_"):
            name += "_" + self.subscript()
        elif name == "e":
            return lambda point: +mp.e
        elif name == "i":
            self.is_complex = True
            return lambda point: mpc(0, 1)
        elif name in _CALLED and self.peek().text == "(":
            name += self.call()
        self.symbols.add(name)
        return lambda point: point[name]

    def call(self) -> str:
        """The text of an unknown function's argument: `f(x)` is a variable of that name."""
        start = self.position
        self.group("(")
        return "".join(token.text for token in self.tokens[start : self.position])

    def subscript(self) -> str:
        if not self.take("{"):
            self.position += 1
            return self.tokens[self.position - 1].text if self.position <= len(self.tokens) else ""
        parts = []
        while self.peek().kind != "end" and self.peek().text != "}":
            parts.append(self.peek().text)
            self.position += 1
        self.expect("}")
        return "".join(parts)

    def command(self, name: str) -> Node:
        if name == "pi":
            return lambda point: +mp.pi
        if name == "infty":
            return lambda point: mp.inf
        if name in _GREEK:
            return self.symbol(name)
        if name in ("frac", "binom"):
            above, below = self.group("{"), self.group("{")
            return _combine(above, below, values.divide if name == "frac" else values.binomial)
        if name == "sqrt":
            degree = self.group("[") if self.peek().text == "[" else lambda point: Fraction(2)
            return _combine(self.group("{"), degree, values.root)
        if name in FUNCTIONS or name in _LOGARITHMS:
            return self.function(name)
        raise Unreadable(name)

    def function(self, name: str) -> Node:
        base: Node | None = None
        if name in _LOGARITHMS and self.take("_"):
            base = self.group("{") if self.peek().text == "{" else self.atom()
        power = self.exponent() if self.take("^") else None
        if name in _INVERSES and power is not None and _is_minus_one(power):
            name, power = _INVERSES[name], None
        node = _unary(self.argument(), FUNCTIONS["ln" if name in _LOGARITHMS else name])
        if name in _LOGARITHMS:
            node = _combine(node, self.logarithm_of_base(name, base), values.divide)
        return node if power is None else _combine(node, power, values.power)

    def logarithm_of_base(self, name: str, base: Node | None) -> Node:
        if base is not None:
            return _unary(base, FUNCTIONS["ln"])
        if name == "lg":
            return lambda point: mp.log(10)
        self.symbols.add(_BASE)
        return lambda point: mp.log(2 + abs(rounded(point[_BASE])))

    def argument(self) -> Node:
        r"""What a function is applied to: a group, or the factors up to the next function or parenthesis."""
        if self.peek().text in ("(", "{", "|", "["):
            return self.group(self.peek().text)
        node = self.power()
        while self.starts_atom() and not self.starts_function():
            if self.peek().kind in _NUMBERS or self.peek().text in "([{":
                break
            node = _combine(node, self.power(), values.multiply)
        return node

    def starts_function(self) -> bool:
        kind, text = self.peek()
        return kind == "command" and (text[1:] in FUNCTIONS or text[1:] in _LOGARITHMS)


_DEGREE_TOKENS = [Token("other", "{"), Token("command", r"\circ"), Token("other", "}")]


def _unary(node: Node, function: Callable[[Value], Value]) -> Node:
    return lambda point: function(node(point))


def _combine(left: Node, right: Node, function: Callable[[Value, Value], Value]) -> Node:
    return lambda point: function(left(point), right(point))


def _negated(node: Node) -> Node:
    return lambda point: -node(point)


def _is_minus_one(node: Node) -> bool:
    try:
        return node({}) == -1
    except KeyError:
        return False
