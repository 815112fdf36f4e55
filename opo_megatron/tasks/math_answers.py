r"""Grading of mathematical answers.  Runs in worker processes, where it may hang or crash.

The answer of a response is the content of its last \boxed{…}.  The comparison is, in this order: of the texts
without typesetting (spaces, \left, \dfrac, \text, units, $); of plain numbers by value; of all else as
expressions, by math-verify.  Three rules, which published problem sets need, override math-verify: words are
compared as words (it reads \text{Evelyn} as a product of letters); a tuple is not a set, nor an interval with
other brackets; an answer without a letter or digit is wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000
"""Characters of an answer; longer ones are wrong."""


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{…} or \fbox{…} whose braces balance; `\boxed 5` is 5."""
    last = None
    for match in re.finditer(r"\\(?:boxed|fbox)\b\s*", text):
        start = match.end()
        if start < len(text) and text[start] == "{":
            content = _balanced(text, start)
            last = content if content is not None else last
        elif token := re.match(r"[^\s$.,;{}]+", text[start : start + LONGEST]):
            last = token.group()
    return last


def _balanced(text: str, start: int) -> str | None:
    """The text between the brace at `start` and its closing brace; None where that is missing."""
    depth, index = 0, start
    while index < len(text):
        if text[index] == "\\":
            index += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + 1 : index]
        index += 1
    return None


_TYPESETTING = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|,|;|!|:|quad|qquad| )(?![A-Za-z])"
    r"|\$|\\\$|~|\\%|%"
    r"|\^\s*\{?\\(?:circ|degree)\}?|\\(?:degree|circ)(?![A-Za-z])"
)
_UNIT = re.compile(
    r"(?<=[\d}\s)])\\(?:text|mbox|mathrm|textrm)\s*\{\s*[^{}\d]*?\b(?:cents?|dollars?|inch(?:es)?|feet|foot|miles?|units?|cm|m|km|"
    r"degrees?|hours?|minutes?|seconds?|square\s*\w+|cubic\s*\w+|sq\s*\w*|cu\s*\w*|mph|days?|years?|ways?|"
    r"people|students|pounds?|grams?|kg|ounces?|gallons?|liters?|meters?|yards?|points?|percent)\b[^{}\d]*\}"
    r"(?:\s*\^\s*(?:\{\d\}|\d))?\s*$"
)
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit|emph)\s*\{([^{}]*)\}")
_BARE = r"\s*(\\[A-Za-z]+|[A-Za-z0-9])"
_BARE_FRACTION = re.compile(rf"\\[dt]?frac{_BARE}{_BARE}")
_PHANTOM = re.compile(r"\\phantom\s*(?:\{[^{}]*\}|[^{}\s])")
"""Reserves the space of its content, and does not show it."""
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}|([-+]?\d+)/(\d+)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\\!|\{,\})\s*(?=\d{3}(?!\d))")


def normalised(answer: str) -> str:
    """The answer without typesetting; equal texts are equal answers."""
    text = answer.strip().rstrip(".").strip()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = _UNIT.sub("", text)
    text = re.sub(r"\\[,;:! ](?=\d{3}(?!\d))", "", text)
    text = _TYPESETTING.sub("", text)
    text = _THOUSANDS.sub("", text) if "(" not in text and "\\{" not in text else text
    text = _WORDS.sub(lambda match: match.group(1), text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*\{(\w)\}", r"^\1", text)
    text = re.sub(r"_\s*\{(\w+)\}", r"_\1", text)
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in(?![A-Za-z]))\s*", "", text)
    return re.sub(r"\s+", "", text).replace("\\\\", "\\")


def value(text: str) -> Fraction | None:
    """The value of a plain number or fraction in normal form; None for other text."""
    if len(text) > 40:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    sign, top, bottom, above, below = match.groups()
    if above is not None:
        return Fraction(int(above), int(below)) if int(below) else None
    fraction = Fraction(int(top), int(bottom)) if int(bottom) else None
    return -fraction if fraction is not None and sign == "-" else fraction


def is_correct(answer: str, gold: str) -> bool:
    """Whether `answer` equals `gold`."""
    if len(answer) > LONGEST or not re.search(r"[A-Za-z0-9]", answer):
        return False
    answer_text, gold_text = normalised(answer), normalised(gold)
    if answer_text == gold_text:
        return True
    values = value(answer_text), value(gold_text)
    if None not in values:
        return values[0] == values[1]
    if _is_words(gold) or _is_words(answer):
        return answer_text.lower().strip("()") == gold_text.lower().strip("()")
    if _brackets(answer_text) != _brackets(gold_text):
        return False
    return _same_expression(answer, gold)


def _is_words(answer: str) -> bool:
    """Whether the answer is words, outside of commands: a name, a weekday, `even`."""
    bare = re.sub(r"\\[A-Za-z]+", " ", _WORDS.sub(lambda match: match.group(1), answer))
    return bool(re.fullmatch(r"[\s(]*[A-Za-z][A-Za-z\s-]{2,}[\s).]*", bare)) and not re.search(r"\d", answer)


def _brackets(text: str) -> str:
    """The kind of a tuple, set, interval or matrix: its outermost brackets; '' for all else."""
    if re.match(r"\\begin\{[pbvV]?matrix\}", text):
        return "matrix"
    if text.startswith("\\{") and text.endswith("\\}"):
        return "set"
    if "," in text and text[:1] in "([" and text[-1:] in ")]" and "\\cup" not in text:
        return text[0] + text[-1]
    return ""


def _same_expression(answer: str, gold: str) -> bool:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    formats = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    boxes = (f"\\boxed{{{_spelled_out(text.strip().rstrip('.'))}}}" for text in (gold, answer))
    expected, actual = (parse(box, formats, parsing_timeout=None) for box in boxes)
    return bool(expected and actual and verify(expected, actual, timeout_seconds=None))


def _spelled_out(text: str) -> str:
    r"""Rewrite what would end the parser's reading: `\frac\pi 2`, `\phantom -1`."""
    return _PHANTOM.sub("", _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text))


def grade(response: str, gold: str) -> float:
    """1 where the last box of a response has the answer `gold`, else 0."""
    answer = last_boxed(response)
    return 0.0 if answer is None else float(is_correct(answer, gold))


def reference(text: str) -> str:
    r"""The gold answer of a reference solution: its last box, what follows GSM8K's ####, or all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed
