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
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(samples: int) -> None:
    correct = torch.arange(samples + 1)
    for k in range(1, samples + 1):
        expected = []
        for c in correct.tolist():
            subsets = list(combinations(range(samples), k))
            expected.append(sum(any(i < c for i in subset) for subset in subsets) / len(subsets))
        torch.testing.assert_close(
            pass_at_k(correct, samples, k), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_pass_at_k_needs_at_least_k_samples() -> None:
    with pytest.raises(ValueError, match="pass@3 needs at least 3 samples"):
        pass_at_k(torch.tensor([1]), 2, 3)


def test_ks_are_powers_of_two_and_the_number_of_samples() -> None:
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_the_bootstrap_interval_has_its_nominal_coverage() -> None:
    rng, covered = random.Random(0), 0
    for trial in range(200):
        values = [float(rng.random() < 0.3) for _ in range(100)]
        low, high = bootstrap_interval(values, seed=trial)
        assert low <= sum(values) / 100 <= high
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def random_responses(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5) for _ in range(rng.randint(1, 25))] for _ in range(rng.randint(2, 6))]


@pytest.mark.parametrize("seed", range(20))
def test_self_bleu_equals_nltk(seed: int) -> None:
    bleu = require("nltk.translate.bleu_score", "pip install -e '.[dev]'")
    smoothing = bleu.SmoothingFunction().method1
    group = random_responses(seed)
    expected = [
        bleu.sentence_bleu(group[:i] + group[i + 1 :], group[i], smoothing_function=smoothing)
        for i in range(len(group))
    ]
    assert self_bleu(group) == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_self_bleu_of_equal_responses_is_1_and_of_disjoint_ones_0() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == pytest.approx(1)
    assert self_bleu([[1] * 5, [2] * 5]) == 0
    with pytest.raises(ValueError, match="only one"):
        self_bleu([[1, 2]])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_repetition_is_the_share_of_n_grams_seen_before(n: int) -> None:
    for response in [*random_responses(n), [7, 7, 7, 7, 7, 7], [1]]:
        seen: list[list[int]] = []
        repeated = total = 0
        for i in range(len(response) - n + 1):
            gram = response[i : i + n]
            repeated += gram in seen
            seen.append(gram)
            total += 1
        assert repetition(response, n) == pytest.approx(repeated / total if total else 0.0)
