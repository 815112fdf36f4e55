"""The gradient estimators on a bandit, where every expectation is a finite sum: exact biases.

An action is a response with a probability softmax(θ), a length and a reward.  A batch is
K independent actions of one prompt.  The gradient of `PolicyGradient`, with the project's
advantages and normaliser, is averaged over all K-tuples of actions in float64.
"""

from __future__ import annotations

import math
from itertools import combinations_with_replacement, product

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, Baseline, Center, LossNormalizer
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.fitted_weights import FittedWeights
from opo_megatron.algorithm.objective import PolicyGradient, loss_normalizer
from opo_megatron.algorithm.presets import PRESETS

THETA = torch.tensor([0.3, -0.5, 1.1, 0.0], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, 0.25, 1.0], dtype=torch.float64)
LENGTHS = torch.tensor([3, 21, 8, 13])
PROBABILITIES = THETA.softmax(0)
SCORES = torch.eye(4, dtype=torch.float64) - PROBABILITIES
"""[a, 4]: ∇θ log π(a)."""
ENERGIES = 1 - 2 * PROBABILITIES + PROBABILITIES.square().sum()
"""[4]: energy of each action as a response of one token."""
TRUE_GRADIENT = (PROBABILITIES * REWARDS) @ SCORES
"""∇θ E[r]."""
LEAVE_ONE_OUT = [
    baseline
    for baseline, preset in PRESETS.items()
    if preset.leave_one_out and not preset.shrink and preset.center is Center.mean
]
"""With `auto`, whose fitted weights are a mixture.  The others are in test_tree.py."""


def config_of(
    baseline: Baseline, normalizer: LossNormalizer, constant: float | None = None
) -> AlgorithmConfig:
    return AlgorithmConfig(
        baseline, **PRESETS[baseline]._asdict(), loss_normalizer=normalizer, loss_constant=constant
    )


def expected_estimate(
    baseline: Baseline,
    samples: int,
    normalizer: LossNormalizer = LossNormalizer.constant,
    lengths: Tensor = LENGTHS,
) -> Tensor:
    """E[−∇loss] over batches of one prompt and K samples.

    The order of a batch does not affect its gradient, so multisets of actions are enumerated, each
    with its multinomial probability.
    """
    config = config_of(baseline, normalizer, constant=float(samples))
    batches = torch.tensor(list(combinations_with_replacement(range(4), samples)))
    counts = (batches.unsqueeze(-1) == torch.arange(4)).sum(1)
    orders = [math.factorial(samples) // math.prod(map(math.factorial, row)) for row in counts.tolist()]
    probabilities = torch.tensor(orders).double() * PROBABILITIES[batches].prod(1)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    return _weighted_gradients(config, batches, probabilities, lengths)


def _weighted_gradients(
    config: AlgorithmConfig, batches: Tensor, probabilities: Tensor, lengths: Tensor
) -> Tensor:
    groups = torch.arange(len(batches)).unsqueeze(1).expand_as(batches)
    fitted = FittedWeights()
    fitted.restore({"means": [1, 11.25, 0.7], "noise": [0] * 15, "coefficients": [0.25, 0.25, 0.5]})
    advantages = compute_advantages(
        config, REWARDS[batches].flatten(), lengths[batches].flatten(), groups.flatten(),
        energies=EnergySums(ENERGIES[batches].flatten(), ENERGIES[batches].flatten()), fitted=fitted,
    ).view_as(batches)  # fmt: skip
    total = torch.zeros(4, dtype=torch.float64)
    for actions, advantage, probability in zip(batches, advantages, probabilities, strict=True):
        objective = PolicyGradient(loss_normalizer(config, lengths[actions]), temperature=1.0)
        _, d_log_prob = objective(PROBABILITIES.log()[actions], {"advantages": advantage})
        total -= probability * (d_log_prob @ SCORES[actions])
    return total


@pytest.mark.parametrize("baseline", LEAVE_ONE_OUT)
@pytest.mark.parametrize("samples", [2, 3, 4])
def test_leave_one_out_estimators_are_unbiased(baseline: Baseline, samples: int) -> None:
    """By enumeration of all ordered K-tuples, each with the product of its probabilities."""
    batches = torch.tensor(list(product(range(4), repeat=samples)))
    probabilities = PROBABILITIES[batches].prod(1)
    config = config_of(baseline, LossNormalizer.constant, constant=float(samples))
    expectation = _weighted_gradients(config, batches, probabilities, LENGTHS)
    torch.testing.assert_close(expectation, TRUE_GRADIENT, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_estimate(baseline, samples), expectation, rtol=0, atol=1e-12)


def test_normalizing_by_the_number_of_sequences_is_unbiased() -> None:
    got = expected_estimate(Baseline.opo_loo, 4, LossNormalizer.sequences)
    torch.testing.assert_close(got, expected_estimate(Baseline.opo_loo, 4), rtol=0, atol=1e-15)


@pytest.mark.parametrize("samples", [2, 3, 4, 8])
def test_group_mean_estimates_one_minus_one_over_k_times_the_gradient(samples: int) -> None:
    got = expected_estimate(Baseline.group_mean, samples)
    torch.testing.assert_close(got, (1 - 1 / samples) * TRUE_GRADIENT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_the_expectation_of_opo_is_its_closed_form(samples: int) -> None:
    """E[(1 − w₁/W)(r₁ − b₋₁) ∇log π₁] by loops, without the project's code."""
    expected = [0.0] * 4
    pi, rewards, lengths = PROBABILITIES.tolist(), REWARDS.tolist(), LENGTHS.tolist()
    for actions in product(range(4), repeat=samples):
        probability = math.prod(pi[a] for a in actions)
        first, others = actions[0], actions[1:]
        rest = sum(lengths[a] for a in others)
        baseline = sum(lengths[a] * rewards[a] for a in others) / rest
        factor = (1 - lengths[first] / (lengths[first] + rest)) * (rewards[first] - baseline)
        for k in range(4):
            expected[k] += probability * factor * (float(k == first) - pi[k])
    got = expected_estimate(Baseline.opo, samples)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_k_times_the_bias_of_opo_converges_to_its_limit() -> None:
    """K·(E[ĝ] − g) → −E[l(r − b*)∇log π]/E[l] with b* = E[lr]/E[l]: w₁/W → l/(K·E[l]) and b₋₁ → b*.

    The distance of K times the bias to the limit is O(1/K), so doubling K halves it.
    """
    mean_length = PROBABILITIES @ LENGTHS.double()
    best = PROBABILITIES @ (LENGTHS * REWARDS) / mean_length
    limit = -(PROBABILITIES * LENGTHS * (REWARDS - best)) @ SCORES / mean_length
    distances = []
    for samples in (4, 8, 16):
        bias = expected_estimate(Baseline.opo, samples) - TRUE_GRADIENT
        assert float(bias.norm() / TRUE_GRADIENT.norm()) > 0.5 / samples
        distances.append(float((samples * bias - limit).norm()))
    assert distances[2] < 0.2 * float(limit.norm())
    assert [distances[i + 1] / distances[i] for i in range(2)] == pytest.approx([0.5, 0.5], abs=0.1)


def test_opo_with_equal_lengths_is_the_group_mean() -> None:
    equal = torch.full((4,), 7)
    got = expected_estimate(Baseline.opo, 4, lengths=equal)
    torch.testing.assert_close(got, 0.75 * TRUE_GRADIENT, rtol=0, atol=1e-12)


def test_normalizing_by_the_batchs_tokens_biases_the_direction() -> None:
    """N depends on the actions, so no constant factor makes the estimate unbiased; equal lengths do."""

    def cosine(lengths: Tensor) -> float:
        estimate = expected_estimate(Baseline.opo_loo, 4, LossNormalizer.tokens, lengths)
        return float(torch.cosine_similarity(estimate, TRUE_GRADIENT, 0))

    assert cosine(LENGTHS) < 0.999
    assert cosine(torch.full((4,), 7)) == pytest.approx(1, abs=1e-12)


def test_squared_score_weights_give_the_minimum_variance_constant_baseline() -> None:
    """Var[(r − b)∇log π] is minimal at b* = E[‖∇log π‖² r]/E[‖∇log π‖²], δ²·E‖∇log π‖² more at b* + δ."""
    squares = SCORES.square().sum(1)
    best = float(PROBABILITIES @ (squares * REWARDS) / (PROBABILITIES @ squares))

    def variance(baseline: float) -> float:
        estimates = (REWARDS - baseline).unsqueeze(1) * SCORES
        torch.testing.assert_close(PROBABILITIES @ estimates, TRUE_GRADIENT, rtol=0, atol=1e-15)
        return float(PROBABILITIES @ (estimates - TRUE_GRADIENT).square().sum(1))

    for delta in (-1.0, -0.1, -1e-3, 1e-3, 0.1, 1.0):
        more = delta**2 * float(PROBABILITIES @ squares)
        assert variance(best + delta) - variance(best) == pytest.approx(more, rel=1e-6)
    assert variance(float(PROBABILITIES @ REWARDS)) > variance(best)


def test_opo_with_squared_score_weights_is_the_optimal_baseline() -> None:
    """A group whose action frequencies equal the policy's probabilities (2 : 1 : 4 : 1 of 8)."""
    group = torch.tensor([2, 0, 2, 3, 0, 2, 1, 2])
    policy = torch.bincount(group).double() / 8
    squares = (torch.eye(4, dtype=torch.float64) - policy).square().sum(1)
    best = policy @ (squares * REWARDS) / (policy @ squares)
    config = config_of(Baseline.opo, LossNormalizer.tokens)
    got = compute_advantages(config, REWARDS[group], squares[group], torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(got, REWARDS[group] - best, rtol=0, atol=1e-14)


def test_normalizers_are_tokens_sequences_or_the_recipes_constant() -> None:
    lengths = torch.tensor([4, 0, 9])
    for normalizer, constant, expected in (
        (LossNormalizer.tokens, None, 13.0),
        (LossNormalizer.sequences, None, 3.0),
        (LossNormalizer.constant, 2.5, 2.5),
    ):
        assert loss_normalizer(config_of(Baseline.opo, normalizer, constant), lengths) == expected
    empty = torch.zeros(3, dtype=torch.int64)
    assert loss_normalizer(config_of(Baseline.opo, LossNormalizer.tokens), empty) == 1.0
