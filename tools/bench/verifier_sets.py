r"""Right and wrong answers to MATH and GSM8K, made by rule, for tests and benchmarks of the verifier `math`.

Nothing here uses the grader: what a rule changes is wrong by construction.  Pairs that a rule leaves equal (0
and -0, swapped coordinates that are the same, another problem with the same answer) are excluded before
grading, and counted.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from opo_megatron.tasks.math_answers import reference

MATH_SIZE, GSM8K_SIZE = 12_500, 8_792
"""Number of problems, train and test splits together."""
OTHER = "another problem's answer"
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FRACTION = re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
_TUPLE = re.compile(r"([(\[])([^()\[\]{}\\]+(?:,[^()\[\]{}\\]+)+)([)\]])")
_UNITS = [
    r"\text{ cm}",
    r"\text{ m}",
    r"\text{ hours}",
    r"\text{ kg}",
    r"^\circ",
    r"\text{ cm}^2",
    r"\text{ dollars}",
    r"\text{ euros}",
]


class Solution(NamedTuple):
    text: str
    """Contains the answer in a box."""
    kind: str
    """MATH's problem type, or gsm8k."""


class Pair(NamedTuple):
    answer: str
    gold: str
    change: str
    """How it differs from the gold answer."""


def boxed(answer: str) -> str:
    return rf"So it is $\boxed{{{answer}}}$."


def rows_of(data: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]


def solutions(data: Path) -> list[Solution]:
    """MATH's reference solutions; GSM8K's final answers in a box."""
    found = []
    for part in ("train", "test"):
        found += [Solution(row["solution"], row["type"]) for row in rows_of(data, f"math/{part}.jsonl")]
        for row in rows_of(data, f"gsm8k/{part}.jsonl"):
            found.append(Solution(boxed(reference(row["answer"])), "gsm8k"))
    return found


def number_of(text: str) -> Fraction | None:
    """The value of a plain number or fraction, without its unit; None for all else."""
    bare = re.sub(
        r"\\text\{(?! and| or)[^{}]*\}|\\mbox\{[^{}]*\}|\^\{?\\circ\}?|\\[$!]|^[a-z]\s*=", "", text
    ).strip()
    bare = re.sub(r"(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))", "", bare)
    bare = re.sub(r"\\[dt]?frac ?(?:(\d)|\{(-?\d+)\}) ?(?:(\d)|\{(\d+)\})", r" \1\2/\3\4", bare).strip()
    is_number = re.fullmatch(r"-?\d+(?:\.\d+)?|-? ?-?\d+/\d*[1-9]\d*", bare)
    return Fraction(bare.replace(" ", "").replace("--", "")) if is_number else None


Rule = Callable[[str, random.Random], Iterator[tuple[str, str, bool]]]
"""(gold, random numbers) → (answer, gold, whether they are equal all the same)."""


def _changed_number(gold: str, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    if number := re.search(r"\d+", gold):
        changed = str(int(number.group()) + rng.choice((1, -1)))
        yield gold[: number.start()] + changed + gold[number.end() :], gold, False


def _changed_sign(gold: str, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    value = number_of(gold)
    if value is not None:
        yield gold.replace("-", "", 1) if value < 0 else f"-{gold}", gold, value == 0
    elif sign := re.search(r"(?<=[\w})])(?<!phantom)\s*[-+]\s*(?=[\w\\])(?<!phantom [-+])", gold):
        other = "-" if "+" in sign.group() else "+"
        yield gold[: sign.start()] + other + gold[sign.end() :], gold, False


def _changed_order(gold: str, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    if match := _TUPLE.fullmatch(gold.replace(r"\left", "").replace(r"\right", "").strip()):
        items = [item.strip() for item in match[2].split(",")]
        shifted = items[1:] + items[:1]
        yield match[1] + ",".join(shifted) + match[3], gold, _sameness(shifted) == _sameness(items)
    if match := _FRACTION.fullmatch(gold):
        yield rf"{match[1]}\frac{{{match[3]}}}{{{match[2]}}}", gold, match[2] == match[3]
    if match := re.fullmatch(r"(\w+) - (\w+)", gold):
        yield f"{match[2]} - {match[1]}", gold, match[1] == match[2]
    if match := re.fullmatch(r"\\text\{([A-Z]{2,})\}", gold):
        yield match[1][::-1], gold, match[1] == match[1][::-1]


def _sameness(items: list[str]) -> list[Any]:
    return [number_of(item) if number_of(item) is not None else item for item in items]


def _changed_unit(gold: str, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    value = number_of(gold)
    if value is not None and re.fullmatch(r"[-\d./\\{}a-z]+", gold):
        ours, theirs = rng.sample(_UNITS, 2)
        yield gold + ours, gold + theirs, value == 0
    elif gold.startswith(r"\$"):
        yield "€" + gold[2:], gold, value == 0


def _changed_magnitude(gold: str, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    value = number_of(gold)
    if value is not None and value.denominator in (1, 2, 5, 10, 100):
        changed = value * rng.choice((Fraction(10), Fraction(1, 10), Fraction(1000), Fraction(1, 1000)))
        yield decimal(changed), gold, value == 0
    if re.fullmatch(r"\d{1,3}(,\d{3})+", gold):
        yield gold.replace(",", ".", 1).replace(",", ""), gold, False


def _changed_bracket(gold: str, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    bare = gold.replace(r"\left", "").replace(r"\right", "").strip()
    if match := re.fullmatch(r"([(\[])([^()\[\]]+,[^()\[\]]+)([)\]])", bare):
        low, high = {"(": "[", "[": "("}[match[1]], {")": "]", "]": ")"}[match[3]]
        yield low + match[2] + match[3], gold, "infty" in match[2].split(",")[0]
        yield match[1] + match[2] + high, gold, "infty" in match[2].split(",")[-1]
        yield rf"\{{{match[2]}\}}", gold, False
        yield match[2], gold, False
    elif re.fullmatch(r"[^()\[\]{}]+(, ?[^()\[\]{}]+)+", gold) and number_of(gold) is None:
        yield f"({gold})", gold, False


def _changed_percent(gold: str, rng: random.Random) -> Iterator[tuple[str, str, bool]]:
    value = number_of(gold.replace(r"\%", ""))
    if value is None or value.denominator not in (1, 2, 5, 10, 100):
        return
    text = decimal(value)
    yield decimal(value / 100) + r"\%", text + r"\%", value == 0
    yield decimal(value / 10), text + r"\%", value == 0
    yield decimal(10 * value), text + r"\%", value == 0
    yield text + r"\%", text, value == 0 or abs(value) > 1


def decimal(value: Fraction) -> str:
    """The digits of a number that ends: 3/20 is 0.15."""
    places = next((n for n in range(12) if (value * 10**n).denominator == 1), 12)
    digits = f"{abs(int(value * 10**places)):0{places + 1}d}"
    text = digits[: len(digits) - places] + ("." + digits[len(digits) - places :] if places else "")
    return f"-{text}" if value < 0 else text


RULES: dict[str, Rule] = {
    "number": _changed_number,
    "sign": _changed_sign,
    "order": _changed_order,
    "unit": _changed_unit,
    "magnitude": _changed_magnitude,
    "bracket": _changed_bracket,
    "percent": _changed_percent,
}


def wrong_answers(
    all_solutions: list[Solution], count: int, seed: int = 0
) -> tuple[list[Pair], Counter[str]]:
    """Wrong answers to `count` of the problems, and how many pairs per rule were equal, and left out."""
    rng = random.Random(seed)
    golds = [(reference(solution.text), solution.kind) for solution in all_solutions]
    by_kind: dict[str, list[str]] = {}
    for gold, kind in golds:
        by_kind.setdefault(kind, []).append(gold)
    found, equal = [], Counter[str]()
    for gold, kind in rng.sample(golds, count):
        if not gold:
            continue
        made = [(change, *pair) for change, rule in RULES.items() for pair in rule(gold, rng)]
        other = rng.choice(by_kind[kind])
        made.append((OTHER, other, gold, _bare(other) == _bare(gold) or not other))
        for change, answer, expected, is_equal in made:
            equal[change] += is_equal
            if not is_equal:
                found.append(Pair(answer, expected, change))
    return found, equal


def _bare(text: str) -> Any:
    """A number by value, all else without spaces, sizes of brackets and the name in front."""
    value = number_of(text.replace(r"\%", ""))
    shorter = re.sub(
        r"\\left|\\right|\\text|[\s{}]|\\[,;! ]|^[a-z]\s*=|\.$", "", text.replace("dfrac", "frac")
    )
    return value if value is not None else sorted(shorter.split(",")) if "(" not in shorter else shorter


def equal_answers(all_solutions: list[Solution], count: int, seed: int = 1) -> list[Pair]:
    """Other ways to write the gold answers of `count` problems: equal by construction."""
    rng = random.Random(seed)
    found = []
    for solution in rng.sample(all_solutions, count):
        gold = reference(solution.text)
        value = number_of(gold)
        if value is not None and value.denominator in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100):
            found.append(Pair(decimal(value), gold, "as a decimal"))
        if match := _FRACTION.fullmatch(gold):
            sign, above, below = match[1], int(match[2]), int(match[3])
            found.append(Pair(f"{sign}{above}/{below}", gold, "with a slash"))
            found.append(Pair(rf"{sign}\dfrac{{{3 * above}}}{{{3 * below}}}", gold, "not in lowest terms"))
        if value is not None and value.denominator == 1 and re.fullmatch(r"-?\d+", gold):
            found.append(Pair(f"x = {gold}", gold, "with a name"))
            found.append(Pair(rf"{gold}\text{{ cm}}", gold, "with a unit"))
            found.append(Pair(gold.replace("-", "−"), gold, "in Unicode"))
            found.append(Pair(f"{int(gold):,}".replace(",", "{,}"), gold, "with thousands"))
        if re.fullmatch(r"[^()\[\]{}]+(, [^()\[\]{}]+)+", gold):
            found.append(Pair(", ".join(gold.split(", ")[::-1]), gold, "in another order"))
            found.append(Pair(rf"\{{{gold}\}}", gold, "as a set"))
        if match := re.fullmatch(r"([^-+=(){}\\]+) \+ ([^-+=(){}\\]+)", gold):
            found.append(Pair(f"{match[2]} + {match[1]}", gold, "commuted"))
        if "\\sqrt{" in gold and re.fullmatch(r"\d*\s*\\sqrt\{\d+\}", gold):
            found.append(Pair(re.sub(r"\\sqrt\{(\d+)\}", r"√\1", gold), gold, "in Unicode"))
            found.append(
                Pair(
                    re.sub(r"\\sqrt\{(\d+)\}", r"\\cdot \1^{1/2}", gold).removeprefix("\\cdot "),
                    gold,
                    "as a power",
                )
            )
        if r"\pi" in gold:
            found.append(Pair(re.sub(r"\\pi(?![a-z])", "π", gold), gold, "in Unicode"))
    return found
