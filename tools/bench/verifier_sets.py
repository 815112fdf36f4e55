"""Correct and wrong answers to all of MATH and GSM8K, for tests and benchmarks of the verifier `math`."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from opo_megatron.tasks.math_answers import normalised, reference, value

MATH_SIZE, GSM8K_SIZE = 12_500, 8_792
"""Number of problems, train and test splits together."""
OTHER = "another problem's answer"


class Solution(NamedTuple):
    text: str
    """Contains the answer in a box."""
    kind: str
    """MATH's problem type, or gsm8k."""


class Wrong(NamedTuple):
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


def altered(gold: str) -> list[tuple[str, str]]:
    """(change, answer) pairs whose answers differ from `gold`."""
    found = []
    if number := re.search(r"\d+", gold):
        for change in (1, -1):
            changed = str(int(number.group()) + change)
            found.append((f"{change:+d}", gold[: number.start()] + changed + gold[number.end() :]))
    if value(normalised(gold)):
        found.append(("other sign", gold[1:] if gold.startswith("-") else f"-{gold}"))
    pair = re.fullmatch(r"(?:\\left)?\(([^,()]+),([^,()]+?)(?:\\right)?\)", gold)
    if pair and normalised(pair.group(1)) != normalised(pair.group(2)):
        found.append(("swapped coordinates", f"({pair.group(2)},{pair.group(1)})"))
    return found


def wrong_answers(all_solutions: list[Solution], count: int, seed: int = 0) -> list[Wrong]:
    """For `count` of the problems: altered answers, and the answer to another problem of the same type."""
    rng = random.Random(seed)
    golds = [(reference(solution.text), solution.kind) for solution in all_solutions]
    by_kind: dict[str, list[str]] = {}
    for gold, kind in golds:
        by_kind.setdefault(kind, []).append(gold)
    found = []
    for gold, kind in rng.sample(golds, count):
        other = rng.choice(by_kind[kind])
        found += [Wrong(answer, gold, change) for change, answer in altered(gold)]
        found += [Wrong(other, gold, OTHER)] if normalised(other) != normalised(gold) else []
    return found
