"""Verifiers by name: (prompt, response, answer) as text → reward.

exact       the response is the answer, up to surrounding white space
number      the last number of the response equals the answer's last number in value
regex       the last match of task.verifier_pattern in the response (its first group) is the answer
math        the response's last \\boxed{…} equals the answer (or the last box of a reference solution, or what
            follows its ####) in value, order, brackets and units, in worker processes (`math_answers.py`)
math_strict the verdict of math-verify alone on the whole response, to compare with published numbers
package.module:function   a user's (`user_verifier.py`), in worker processes
http://host:port/path     a service's (`reward_service.py`)

The first three are here; `graders.py` opens what a recipe names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Context, Decimal

from opo_megatron.errors import UserError

MATH, MATH_STRICT = "math", "math_strict"
Verifier = Callable[[str, str, str], float]

_SIGNS = str.maketrans({"−": "-", "－": "-", "﹣": "-", "‑": "-", "–": "-"})
_POWER_OF_TEN = re.compile("10([⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
_SEPARATOR = r"(?:,|\{,\}|\\[,!]|[\u00a0\u2007\u2009\u202f])"
_NUMBER = re.compile(
    r"((?:(?<![\w)\]}])|(?<=_))-\\?[$€£¥]?|)"
    rf"((?<!\d)\d{{1,3}}(?:{_SEPARATOR}\d{{2,3}})*{_SEPARATOR}\d{{3}}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:[eE]([-+]?\d{1,6})(?![\w.]*\d)|\s*(?:×|\*|x|·|\\times|\\cdot)\s*10\s*\^\s*\{?\s*([-+]?\d{1,6}))?"
)
_EXACT = Context(prec=10_000, Emax=10**8, Emin=-(10**8))


def exact(prompt: str, response: str, answer: str) -> float:
    """1 where both texts agree, up to surrounding white space."""
    return float(response.strip() == answer.strip())


def number(prompt: str, response: str, answer: str) -> float:
    """1 where the last numbers of both texts are equal in value: `1,000` is `1000.0`."""
    actual, expected = last_number(response), last_number(answer)
    return float(actual is not None and actual == expected)


def last_number(text: str) -> Decimal | None:
    """The last decimal number in a text: `-1,234.5`, `1.5e3`, `1.5 × 10^3`.

    Commas and thin spaces are read where they separate thousands, and a minus sign where nothing stands
    before it that it could be subtracted from: the last number of `3-5` is 5.
    """
    text = _POWER_OF_TEN.sub(lambda match: "10^" + unicodedata.normalize("NFKC", match.group(1)), text)
    matches = list(_NUMBER.finditer(text.translate(_SIGNS)))
    if not matches:
        return None
    sign, digits, exponent, power = matches[-1].groups()
    value = Decimal(sign[:1] + re.sub(r"[^\d.]", "", digits))
    return value.scaleb(int(exponent or power or 0), _EXACT)


def regex(pattern: str) -> Verifier:
    """1 where the last match's first group (or the whole match) is the answer."""
    compiled = compile_pattern("task.verifier_pattern", pattern)

    def verify(prompt: str, response: str, answer: str) -> float:
        match = last_match(compiled, response)
        return float(match is not None and match.strip() == answer.strip())

    return verify


def last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """First group (or the whole) of the last match of `pattern` in `text`."""
    matches = list(pattern.finditer(text))
    return None if not matches else (matches[-1].group(1) if pattern.groups else matches[-1].group(0))


def compile_pattern(key: str, pattern: str) -> re.Pattern[str]:
    """Compile a user's regular expression.

    Raises:
        UserError: naming the key and the error.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}={pattern!r} is not a regular expression ({error}); fix it") from None
