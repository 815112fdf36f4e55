"""Diversity of the responses to one problem, and repetition within a response; both over token ids.

Self-BLEU (Zhu et al. 2018, arXiv 1802.01886): the mean BLEU-4 of each response with all others to the
same problem as references; 1 if all are equal.  Rep-n: the share of a response's n-grams that repeat an
earlier one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4
SMOOTHING = 0.1
"""Count used in place of 0 matches (smoothing method 1 of Chen and Cherry 2014)."""

Tokens = Sequence[int]


def self_bleu(responses: Sequence[Tokens]) -> float:
    """Self-BLEU of at least two responses to one problem."""
    if len(responses) < 2:
        raise ValueError("Self-BLEU compares a response with others, but there is only one")
    counts = [[_ngrams(response, n) for n in range(1, ORDER + 1)] for response in responses]
    highest = [_two_highest([one[n] for one in counts]) for n in range(ORDER)]
    lengths = [len(response) for response in responses]
    return sum(_bleu(i, counts[i], highest, lengths) for i in range(len(responses))) / len(responses)


def _ngrams(response: Tokens, n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(response[i : i + n]) for i in range(len(response) - n + 1))


def _two_highest(counts: Sequence[Counter[tuple[int, ...]]]) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """N-gram → (highest count in a response, that response, highest count in any other)."""
    result: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for i, own in enumerate(counts):
        for gram, count in own.items():
            most, argmax, second = result.get(gram, (0, -1, 0))
            result[gram] = (count, i, most) if count > most else (most, argmax, max(second, count))
    return result


def _bleu(
    i: int,
    counts: Sequence[Counter[tuple[int, ...]]],
    highest: Sequence[dict[tuple[int, ...], tuple[int, int, int]]],
    lengths: Sequence[int],
) -> float:
    """BLEU of response i with all others as references."""
    logs: list[float] = []
    for own, best in zip(counts, highest, strict=True):
        total = sum(own.values())
        clipped = 0
        for gram, count in own.items():
            most, argmax, second = best[gram]
            clipped += min(count, second if argmax == i else most)
        if not logs and clipped == 0:
            return 0.0  # no word in common
        logs.append(math.log((clipped or SMOOTHING) / max(1, total)))
    others = [length for j, length in enumerate(lengths) if j != i]
    closest = min(others, key=lambda length: (abs(length - lengths[i]), length))
    brevity = 1.0 if lengths[i] > closest else math.exp(1 - closest / max(1, lengths[i]))
    return brevity * math.exp(sum(logs) / ORDER)


def repetition(response: Tokens, n: int) -> float:
    """Rep-n: 1 − distinct n-grams / n-grams; 0 for a response shorter than n."""
    grams = _ngrams(response, n)
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0
