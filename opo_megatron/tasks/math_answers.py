r"""Grading of mathematical answers.  Runs in worker processes, where it may hang or crash.

The answer of a response is the content of its last \boxed{…}.  It is right where it says the same as the gold
answer: `math_notation.py` brings both to one spelling, `math_forms.py` takes them apart at separators and
brackets, `math_compare.py` compares the parts, numbers and expressions by value (`math_expression.py`).

What is not understood is compared as text.  Nothing is dropped to make two answers equal: where a reward is
wrong, it is more likely a 0 than a 1.
"""

from __future__ import annotations

import re
from functools import lru_cache

from opo_megatron.tasks.math_compare import same
from opo_megatron.tasks.math_forms import Form, Group, Quantity, read, region
from opo_megatron.tasks.math_notation import closing_braces, compact, plain

LONGEST = 1000
"""Characters of an answer; longer ones are wrong."""


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{…} or \fbox{…} whose braces balance; `\boxed 5` is 5."""
    last, closing = None, closing_braces(text)
    for match in re.finditer(r"\\(?:boxed|fbox)\b\s*", text):
        start = match.end()
        if start < len(text) and text[start] == "{":
            last = text[start + 1 : closing[start]] if start in closing else last
        elif token := re.match(r"[^\s$.,;{}]+", text[start : start + LONGEST]):
            last = token.group()
    return last


def is_correct(answer: str, gold: str, context: str | None = None) -> bool:
    """Whether `answer` equals `gold`.

    Args:
        context: the problem and its reference solution, if known: they tell whether a gold `(0, 1)` is an
            interval, which `0 < x < 1` equals, or a point.
    """
    if len(answer) > LONGEST:
        return False
    text = compact(plain(answer))
    if not text or not re.search(r"[^\W_]|\\\{|\\emptyset", text):
        return False
    if text == compact(plain(gold)):
        return True
    expected = _read_gold(gold, context is not None and says_interval(context))
    if same(read(answer), expected):
        return True
    is_list = isinstance(expected, Group) and expected.brackets in ("", "{}")
    return is_list and "," in answer and same(read(answer, joins_thousands=False), expected)


@lru_cache(maxsize=4096)
def _read_gold(gold: str, is_interval: bool) -> Form:
    form = read(gold)
    if is_interval and isinstance(form, Group) and all(isinstance(item, Quantity) for item in form.items):
        return region(form, is_interval=True) or form
    return form


def says_interval(context: str) -> bool:
    """Whether a text speaks of intervals, and not of pairs or coordinates."""
    words = context.lower()
    return "interval" in words and not re.search(r"ordered (?:pair|triple)|coordinates", words)


def grade(response: str, gold: str, context: str | None = None) -> float:
    """1 where the last box of a response has the answer `gold`, else 0; `context` is that of `is_correct`."""
    answer = last_boxed(response)
    return 0.0 if answer is None else float(is_correct(answer, gold, context))


def strict_grade(response: str, gold: str, context: str | None = None) -> float:
    """math-verify's verdict alone, with its defaults: the gold answer in a box, and the whole response."""
    from math_verify import parse, verify

    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    actual = parse(response, parsing_timeout=None)
    return float(bool(expected and actual and verify(expected, actual, timeout_seconds=None)))


def reference(text: str) -> str:
    r"""The gold answer of a reference solution: its last box, what follows GSM8K's ####, or all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed
