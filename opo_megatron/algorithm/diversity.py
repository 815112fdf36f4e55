"""How alike are the answers to one problem, and how much does an answer repeat itself?

Self-BLEU (Zhu et al. 2018, arXiv 1802.01886): the BLEU-4 of every answer with all others to the same
problem as references, averaged; 1 where all are the same.  Rep-n: the share of an answer's n-grams
that stood in it before.  Both over token ids.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4
SMOOTHING = 0.1
"""Matches that are counted where there are none (method 1 of Chen and Cherry 2014)."""

Tokens = Sequence[int]


def self_bleu(answers: Sequence[Tokens]) -> float:
    """Mean over `answers`, of which there are at least two, to one problem."""
    if len(answers) < 2:
        raise ValueError("Self-BLEU compares an answer with others, but there is only one")
    counts = [[_ngrams(answer, n) for n in range(1, ORDER + 1)] for answer in answers]
    highest = [_two_highest([one[n] for one in counts]) for n in range(ORDER)]
    lengths = [len(answer) for answer in answers]
    return sum(_bleu(i, counts[i], highest, lengths) for i in range(len(answers))) / len(answers)


def _ngrams(answer: Tokens, n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(answer[i : i + n]) for i in range(len(answer) - n + 1))


def _two_highest(counts: Sequence[Counter[tuple[int, ...]]]) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """N-gram → (most that an answer has of it, which answer, most that another has)."""
    found: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for i, own in enumerate(counts):
        for gram, count in own.items():
            most, whose, second = found.get(gram, (0, -1, 0))
            found[gram] = (count, i, most) if count > most else (most, whose, max(second, count))
    return found


def _bleu(
    i: int,
    counts: Sequence[Counter[tuple[int, ...]]],
    highest: Sequence[dict[tuple[int, ...], tuple[int, int, int]]],
    lengths: Sequence[int],
) -> float:
    """Of answer i against all others."""
    logs: list[float] = []
    for own, best in zip(counts, highest, strict=True):
        total = sum(own.values())
        clipped = 0
        for gram, count in own.items():
            most, whose, second = best[gram]
            clipped += min(count, second if whose == i else most)
        if not logs and clipped == 0:
            return 0.0  # no word in common
        logs.append(math.log((clipped or SMOOTHING) / max(1, total)))
    others = [length for j, length in enumerate(lengths) if j != i]
    closest = min(others, key=lambda length: (abs(length - lengths[i]), length))
    brevity = 1.0 if lengths[i] > closest else math.exp(1 - closest / max(1, lengths[i]))
    return brevity * math.exp(sum(logs) / ORDER)


def repetition(answer: Tokens, n: int) -> float:
    """Rep-n: 1 − different n-grams / n-grams; 0 for an answer shorter than n."""
    grams = _ngrams(answer, n)
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0
