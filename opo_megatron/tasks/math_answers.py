r"""Is a mathematical answer the right one?  Runs in worker processes, where it may hang or crash.

The answer of a response is the content of its last \boxed{…}.  Compared are, in this order: the texts
without what only typesets (spaces, \left, \dfrac, \text, units, $); plain numbers by value; and all else
by math-verify, as expressions.  On three points its judgement is overruled, because answers of real
problem sets need it: words are compared as words (it reads \text{Evelyn} as a product of letters), a
tuple is no set and no interval of other brackets, and an answer without a letter or digit is none.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000
"""Characters of an answer; longer ones are no answers to anything."""


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{…} or \fbox{…} whose braces balance; `\boxed 5` is 5."""
    found = None
    for match in re.finditer(r"\\(?:boxed|fbox)\b\s*", text):
        start = match.end()
        if start < len(text) and text[start] == "{":
            content = _balanced(text, start)
            found = content if content is not None else found
        elif token := re.match(r"[^\s$.,;{}]+", text[start : start + LONGEST]):
            found = token.group()
    return found


def _balanced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and the one that closes it."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place]
        place += 1
    return None


_NOTHING = re.compile(
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
"""It takes the place of what it holds, and does not show it."""
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_FRACTION = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}|([-+]?\d+)/(\d+)")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\\!|\{,\})\s*(?=\d{3}(?!\d))")


def normalised(answer: str) -> str:
    """The answer without what only typesets it; equal texts are equal answers."""
    text = answer.strip().rstrip(".").strip()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = _UNIT.sub("", text)
    text = re.sub(r"\\[,;:! ](?=\d{3}(?!\d))", "", text)
    text = _NOTHING.sub("", text)
    text = _THOUSANDS.sub("", text) if "(" not in text and "\\{" not in text else text
    text = _WORDS.sub(lambda match: match.group(1), text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"\^\s*\{(\w)\}", r"^\1", text)
    text = re.sub(r"_\s*\{(\w+)\}", r"_\1", text)
    text = re.sub(r"^[a-zA-Z]\s*(?:=|\\in(?![A-Za-z]))\s*", "", text)
    return re.sub(r"\s+", "", text).replace("\\\\", "\\")


def value(text: str) -> Fraction | None:
    """Of a plain number or fraction in normal form."""
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
    found = Fraction(int(top), int(bottom)) if int(bottom) else None
    return -found if found is not None and sign == "-" else found


def is_correct(answer: str, gold: str) -> bool:
    """Whether `answer` says what `gold` says."""
    if len(answer) > LONGEST or not re.search(r"[A-Za-z0-9]", answer):
        return False
    ours, theirs = normalised(answer), normalised(gold)
    if ours == theirs:
        return True
    values = value(ours), value(theirs)
    if None not in values:
        return values[0] == values[1]
    if _is_words(gold) or _is_words(answer):
        return ours.lower().strip("()") == theirs.lower().strip("()")
    if _brackets(ours) != _brackets(theirs):
        return False
    return _same_expression(answer, gold)


def _is_words(answer: str) -> bool:
    """Text of several letters in a row, outside of commands: a name, a weekday, `even`."""
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

    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    boxes = (f"\\boxed{{{_spelled_out(text.strip().rstrip('.'))}}}" for text in (gold, answer))
    wanted, found = (parse(box, kinds, parsing_timeout=None) for box in boxes)
    return bool(wanted and found and verify(wanted, found, timeout_seconds=None))


def _spelled_out(text: str) -> str:
    r"""What the parser would leave out, and all behind it: `\frac\pi 2`, `\phantom -1`."""
    return _PHANTOM.sub("", _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text))


def grade(response: str, gold: str) -> float:
    """1 where the last box of a response holds the answer `gold`, else 0."""
    answer = last_boxed(response)
    return 0.0 if answer is None else float(is_correct(answer, gold))


def reference(text: str) -> str:
    r"""The answer in a reference solution: its last box, what follows GSM8K's ####, or all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed
