"""pass@k by brute force; Self-BLEU and Rep-n against independent implementations."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch

from opo_megatron.algorithm.diversity import repetition, self_bleu
from opo_megatron.algorithm.pass_at_k import bootstrap_interval, pass_at_k, powers_of_two
from tests.support.requirements import require


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples: int) -> None:
    right = torch.arange(samples + 1)
    for k in range(1, samples + 1):
        expected = []
        for c in right.tolist():
            subsets = list(combinations(range(samples), k))
            expected.append(sum(any(i < c for i in subset) for subset in subsets) / len(subsets))
        torch.testing.assert_close(
            pass_at_k(right, samples, k), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_more_samples_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples"):
        pass_at_k(torch.tensor([1]), 2, 3)


def test_ks_are_powers_of_two_and_the_number_itself() -> None:
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    rng, covered = random.Random(0), 0
    for trial in range(200):
        values = [float(rng.random() < 0.3) for _ in range(100)]
        low, high = bootstrap_interval(values, seed=trial)
        assert low <= sum(values) / 100 <= high
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def answers(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5) for _ in range(rng.randint(1, 25))] for _ in range(rng.randint(2, 6))]


@pytest.mark.parametrize("seed", range(20))
def test_self_bleu_is_nltks(seed: int) -> None:
    bleu = require("nltk.translate.bleu_score", "pip install -e '.[dev]'")
    smoothing = bleu.SmoothingFunction().method1
    group = answers(seed)
    expected = [
        bleu.sentence_bleu(group[:i] + group[i + 1 :], group[i], smoothing_function=smoothing)
        for i in range(len(group))
    ]
    assert self_bleu(group) == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_self_bleu_of_equal_answers_is_one_and_of_strangers_zero() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert self_bleu([[1] * 5, [2] * 5]) == 0
    with pytest.raises(ValueError, match="only one"):
        self_bleu([[1, 2]])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_repetition_counts_what_stood_there_before(n: int) -> None:
    for answer in [*answers(n), [7, 7, 7, 7, 7, 7], [1]]:
        seen: list[list[int]] = []
        repeated = total = 0
        for i in range(len(answer) - n + 1):
            gram = answer[i : i + n]
            repeated += gram in seen
            seen.append(gram)
            total += 1
        assert repetition(answer, n) == pytest.approx(repeated / total if total else 0.0)
