"""Units of an answer: `5 cm`, `5\\text{ square miles}`, `\\$5`, `9\\text{ a.m.}`.

A unit that one side leaves out is not asked for.  Where both have one, it must be the same, or measure the
same with another size: 2 hours are 120 minutes.  Words that are no unit (`ways`, `red balls`) are compared in
the same way: one side may leave them out, or say more.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    dimension: str
    power: int
    size: Fraction
    """In units of its dimension, before the power."""


_TABLE = {
    "length": "meter metre m:1, kilometer kilometre km:1000, centimeter centimetre cm:0.01, "
    "millimeter millimetre mm:0.001, "
    "inch inche in:0.0254, foot feet ft:0.3048, yard yd:0.9144, mile mi:1609.344",
    "time": "second sec s:1, minute min:60, hour hr h:3600, day:86400, week:604800",
    "calendar": "month:1, year yr:12",
    "mass": "gram gm g:1, kilogram kg:1000, milligram mg:0.001, pound lb:453.59237, "
    "ounce oz:28.349523125, ton:907184.74, tonne:1000000",
    "volume": "liter litre l:1, milliliter ml:0.001, gallon gal:3.785411784, "
    "quart:0.946352946, pint:0.473176473, cup:0.2365882365",
    "area": "acre:1, hectare:2.4710538",
    "dollar": "dollar usd $:1, cent ¢:0.01",
    "euro": "euro eur €:1",
    "sterling": "£ gbp:1, pence penny p:0.01",
    "yen": "yen jpy ¥ yuan rmb:1",
    "rupee": "rupee rs inr ₹:1",
    "angle": "degree deg:1",
    "radian": "radian rad:1",
    "celsius": "°c celsius:1",
    "fahrenheit": "°f fahrenheit:1",
    "speed": "mph:1, kph kmph kmh:0.621371192",
    "a.m.": "am:1",
    "p.m.": "pm:1",
}
_UNITS = {
    word: (dimension, Fraction(size))
    for dimension, line in _TABLE.items()
    for words, size in (entry.split(":") for entry in line.split(", "))
    for word in words.split()
}
MULTIPLIERS = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_CHANGING_WORDS = """squared cubed half halves third thirds quarter quarters fourths fifths sixths sevenths
eighths ninths tenths hundredths thousandths less more fewer below above minus plus times over not no or and
wrong incorrect mod modulo to through factorial doubled tripled base least most than basis permille"""
_CHANGING = frozenset(_CHANGING_WORDS.split())
"""Words behind a number that change what it says, in ways that are not read."""
_FILLING_WORDS = "of the a an in per each total square squared cubic sq cu units unit"
_FILLERS = frozenset(_FILLING_WORDS.split())
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def unit_of(words: str, exponent: int = 1) -> Unit | None:
    """The unit in these words: `square feet` is `ft` with exponent 2; None where they hold no unit."""
    text = re.sub(r"([ap])\.\s*m\b\.?", r"\1m", words.lower().replace("\\$", "$"))
    parts = re.findall(r"°[cf]|[a-z]+|[$¢€£¥₹]|/", text)
    if "per" in parts or "/" in parts:
        known = [_lookup(part) for part in parts]
        named = [f"{one[0]}:{one[1]}" for one in known if one is not None]
        speed = {"length:201168/125 time:3600": "mph", "length:1000 time:3600": "kph"}.get(" ".join(named))
        return (
            unit_of(speed)
            if speed
            else Unit(" ".join(text.split()), exponent, Fraction(1))
            if named
            else None
        )
    power = next((_POWERS[part] for part in parts if part in _POWERS), exponent)
    found = next((one for one in map(_lookup, parts) if one is not None), None)
    return None if found is None else Unit(found[0], power, found[1])


def _lookup(word: str) -> tuple[str, Fraction] | None:
    plurals = (word.removesuffix("s"), word.removesuffix("es")) if len(word) > 2 else ()
    for name in (word, *plurals):
        if name in _UNITS:
            return _UNITS[name]
    return None


def nouns_of(words: str) -> frozenset[str]:
    """The words that are no units: what was counted, or which of two."""
    parts = re.findall(r"[^\W\d_]+", re.sub(r"([ap])\.\s*m\b\.?", r"\1m", words))
    found = {part.lower() if len(part) > 2 else part for part in parts if _lookup(part.lower()) is None}
    return frozenset(part.removesuffix("s") for part in found - _FILLERS - MULTIPLIERS.keys())


def multiplier_of(words: str) -> int | None:
    """What a number is multiplied by in front of these words; None where that is unclear."""
    parts = re.findall("[a-z]+", words.lower())
    known = {"squared", "cubed"} if unit_of(words) is not None else set()
    if re.search(r"\d|!", words) or (_CHANGING - known).intersection(parts):
        return None
    return math.prod(MULTIPLIERS.get(part.removesuffix("s"), 1) for part in parts)


def is_written_out(word: str) -> bool:
    """Whether a bare word after a number is a unit: single letters are variables."""
    lower = word.lower()
    return len(word) > 1 and (_lookup(lower) is not None or lower in MULTIPLIERS)
