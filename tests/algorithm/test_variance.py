"""The variance report against enumeration, and the weights that `auto` fits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.energy import EnergySums, energy
from opo_megatron.algorithm.fitted_weights import CANDIDATES, FittedWeights
from opo_megatron.algorithm.variance import (
    GradientGram,
    between_prompts,
    correlation,
    estimators,
    shrunken_estimators,
    update_fitted,
    variance_and_signal,
    variance_of_shrunken,
)

ACTIONS, SAMPLES = 2, 3
PROBABILITIES = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
"""[prompt, action]: two equally likely prompts, each with its own policy and rewards."""
REWARDS = torch.tensor([[1.0, 0.0], [0.25, 1.0]], dtype=torch.float64)
LENGTHS = torch.tensor([2.0, 5.0], dtype=torch.float64)
GRADIENTS = torch.tensor(
    [[[1.0, 2.0, 0.5], [-7 / 3, -14 / 3, -7 / 6]], [[4.0, -1.0, 0.0], [-1.0, 0.25, 0.0]]], dtype=torch.float64
)
"""[prompt, action, 3]: score functions, with mean 0 under each prompt's policy."""


def batch(prompts: tuple[int, ...], actions: tuple[int, ...]) -> tuple[GradientGram, float]:
    """A batch of prompts with SAMPLES actions each, and its probability."""
    groups = torch.arange(len(prompts)).repeat_interleave(SAMPLES)
    prompt_of, action_of = torch.tensor(prompts)[groups], torch.tensor(actions)
    gradients = GRADIENTS[prompt_of, action_of]
    sums = 1 - 2 * PROBABILITIES[prompt_of, action_of] + PROBABILITIES[prompt_of].square().sum(1)
    gram = GradientGram(
        gradients @ gradients.T,
        REWARDS[prompt_of, action_of],
        LENGTHS[action_of],
        groups,
        EnergySums(sums, 2 * sums),
    )
    return gram, float(PROBABILITIES[prompt_of, action_of].prod()) / 2 ** len(prompts)


def one_gradient(gram: GradientGram, prompt: int, actions: tuple[int, ...], advantage: Tensor) -> Tensor:
    return (advantage.unsqueeze(1) * GRADIENTS[prompt, list(actions)]).mean(0)


def test_scores_have_mean_zero() -> None:
    assert float((PROBABILITIES.unsqueeze(2) * GRADIENTS).sum(1).abs().max()) < 1e-15


def test_variance_and_signal_of_every_estimator_are_unbiased() -> None:
    """Over all batches of two prompts with three actions each, against the moments of single prompts."""
    fitted = FittedWeights()
    names = list(estimators(batch((0, 1), (0,) * 6)[0], fitted))
    assert {"none", "opo", "rloo", "grpo", "energy_loo", "auto", "true_norm_loo"} <= set(names)
    mean = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    square = dict.fromkeys(names, 0.0)
    true_gradients = []
    for prompt in (0, 1):
        true_gradients.append((PROBABILITIES[prompt] * REWARDS[prompt]) @ GRADIENTS[prompt])
        for actions in product(range(ACTIONS), repeat=SAMPLES):
            gram, probability = batch((prompt,), actions)
            for name, advantage in estimators(gram, fitted).items():
                estimate = one_gradient(gram, prompt, actions, advantage)
                mean[name] += probability * estimate
                square[name] += probability * float(estimate.square().sum())
    means = dict.fromkeys(names, (0.0, 0.0))
    between, total = 0.0, 0.0
    for prompts in product((0, 1), repeat=2):
        for actions in product(range(ACTIONS), repeat=2 * SAMPLES):
            gram, probability = batch(prompts, actions)
            total += probability
            between_of_batch = between_prompts(gram)
            assert between_of_batch is not None
            between += probability * between_of_batch
            for name, advantage in estimators(gram, fitted).items():
                variance, signal = variance_and_signal(gram, advantage)
                means[name] = (means[name][0] + probability * variance, means[name][1] + probability * signal)
    assert total == pytest.approx(1, abs=1e-12)
    for name in names:
        signal = float(mean[name].square().sum())
        assert means[name] == pytest.approx((square[name] - signal, signal), rel=1e-10), name
    prompt_gradients = torch.stack(true_gradients)
    expected = float((prompt_gradients - prompt_gradients.mean(0)).square().sum(1).mean())
    assert between == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["james_stein", "james_stein_auto"])
def test_the_variance_of_dependent_prompts_is_unbiased(
    name: str,
) -> None:
    """P times the variance of the mean over both prompts, by enumeration; the usual formula fails."""
    fitted = FittedWeights()
    mean, square = torch.zeros(3, dtype=torch.float64), 0.0
    reported = as_if_independent = signals = 0.0
    for prompts in product((0, 1), repeat=2):
        for actions in product(range(ACTIONS), repeat=2 * SAMPLES):
            gram, probability = batch(prompts, actions)
            advantages = shrunken_estimators(gram, fitted)[name]
            step = sum(
                one_gradient(gram, prompt, actions[own], advantages[own]) / 2
                for prompt, own in zip(prompts, (slice(0, SAMPLES), slice(SAMPLES, None)), strict=True)
            )
            mean += probability * step
            square += probability * float(step.square().sum())
            variance, signal = variance_of_shrunken(gram, advantages)
            reported, signals = reported + probability * variance, signals + probability * signal
            as_if_independent += probability * variance_and_signal(gram, advantages)[0]
    expected = 2 * (square - float(mean.square().sum()))
    assert reported == pytest.approx(expected, rel=1e-10)
    assert signals == pytest.approx(float(mean.square().sum()), rel=1e-10)
    assert abs(as_if_independent - expected) > 1e-3 * expected


def test_two_samples_per_prompt_give_no_variance_between_prompts() -> None:
    gram, _ = batch((0, 1), (0, 1, 0, 1, 0, 0))
    pairs = torch.tensor([0, 1, 3, 4])
    smaller = GradientGram(
        gram.gram[pairs][:, pairs], gram.rewards[pairs], gram.lengths[pairs],
        gram.groups[pairs], gram.energies.select(pairs),
    )  # fmt: skip
    assert between_prompts(smaller) is None and between_prompts(gram) is not None


def test_correlation_is_within_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(4).repeat_interleave(6)
    norms = torch.rand(24, generator=generator, dtype=torch.float64) + 10 * groups
    values = torch.rand(24, generator=generator, dtype=torch.float64) - 7 * groups
    gram = GradientGram(
        torch.diag(norms), torch.zeros(24), torch.ones(24), groups, EnergySums(values, values)
    )
    centred = [x.view(4, 6) - x.view(4, 6).mean(1, keepdim=True) for x in (norms, values)]
    expected = torch.corrcoef(torch.stack([x.flatten() for x in centred]))[0, 1]
    assert correlation(gram, values) == pytest.approx(float(expected), rel=1e-12)
    assert correlation(gram, gram.lengths) is None


def test_fitted_weights_minimize_the_noise_and_restore_from_state() -> None:
    fitted = FittedWeights()
    gram, _ = batch((0, 1), (0, 1, 0, 1, 0, 0))
    first = fitted(gram.lengths, gram.energies)
    torch.testing.assert_close(first, gram.lengths)
    noises = []
    for weights in fitted.candidates(gram.lengths, gram.energies):
        estimates = []
        for prompt in (0, 1):
            w, r = (x.view(2, 3)[prompt] for x in (weights, gram.rewards))
            others = (w.sum() - w, (w * r).sum() - w * r)
            actions = ((0, 1, 0), (1, 0, 0))[prompt]
            estimates.append(one_gradient(gram, prompt, actions, r - others[1] / others[0]))
        noises.append(float(sum(e.square().sum() for e in estimates)))
    update_fitted(fitted, gram)
    assert len(CANDIDATES) == 15 and len(set(noises)) == 15
    best = min(range(15), key=noises.__getitem__)
    assert torch.equal(fitted.coefficients, CANDIDATES[best])
    other = FittedWeights()
    other.restore(fitted.state())
    later = batch((1, 0), (1, 1, 0, 0, 1, 0))[0]
    assert torch.equal(fitted(later.lengths, later.energies), other(later.lengths, later.energies))
    update_fitted(fitted, later)
    update_fitted(other, later)
    assert fitted.state() == other.state()


def test_energy_is_the_squared_norm_of_the_logit_gradient() -> None:
    logits = torch.randn(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    sampled = logits.argmax(1)
    probabilities = logits.softmax(1)
    expected = (torch.nn.functional.one_hot(sampled, 9) - probabilities).square().sum(1)
    log_prob = probabilities[torch.arange(50), sampled].log()
    torch.testing.assert_close(energy(log_prob, probabilities.square().sum(1)), expected)
    near_one = torch.tensor([-3e-8, 0.0])
    assert (energy(near_one, torch.tensor([0.99999994, 0.99999994])) >= 0).all()
