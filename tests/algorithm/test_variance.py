"""The variance report's numbers against enumeration, and what `auto` makes of them."""

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
    update_fitted,
    variance_and_signal,
)

ACTIONS, SAMPLES = 2, 3
CHANCES = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)
"""[prompt, action]: two kinds of prompts, equally likely, with a policy and rewards of their own."""
REWARDS = torch.tensor([[1.0, 0.0], [0.25, 1.0]], dtype=torch.float64)
LENGTHS = torch.tensor([2.0, 5.0], dtype=torch.float64)
GRADIENTS = torch.tensor(
    [[[1.0, 2.0, 0.5], [-7 / 3, -14 / 3, -7 / 6]], [[4.0, -1.0, 0.0], [-1.0, 0.25, 0.0]]], dtype=torch.float64
)
"""[prompt, action, 3]: scores, whose mean under each prompt's policy is 0."""


def batch(prompts: tuple[int, ...], actions: tuple[int, ...]) -> tuple[GradientGram, float]:
    """A batch of prompts with SAMPLES actions each, and its probability."""
    groups = torch.arange(len(prompts)).repeat_interleave(SAMPLES)
    kinds, acted = torch.tensor(prompts)[groups], torch.tensor(actions)
    gradients = GRADIENTS[kinds, acted]
    sums = 1 - 2 * CHANCES[kinds, acted] + CHANCES[kinds].square().sum(1)
    measured = GradientGram(
        gradients @ gradients.T, REWARDS[kinds, acted], LENGTHS[acted], groups, EnergySums(sums, 2 * sums)
    )
    return measured, float(CHANCES[kinds, acted].prod()) / 2 ** len(prompts)


def one_gradient(measured: GradientGram, prompt: int, actions: tuple[int, ...], advantage: Tensor) -> Tensor:
    return (advantage.unsqueeze(1) * GRADIENTS[prompt, list(actions)]).mean(0)


def test_scores_have_mean_zero() -> None:
    assert float((CHANCES.unsqueeze(2) * GRADIENTS).sum(1).abs().max()) < 1e-15


def test_variance_and_signal_of_every_estimator_are_unbiased() -> None:
    """Over all batches of two prompts with three actions each, against moments over all single prompts."""
    fitted = FittedWeights()
    names = list(estimators(batch((0, 1), (0,) * 6)[0], fitted))
    assert {"none", "opo", "rloo", "grpo", "energy_loo", "auto", "true_norm_loo"} <= set(names)
    mean = {name: torch.zeros(3, dtype=torch.float64) for name in names}
    square = dict.fromkeys(names, 0.0)
    true_gradients = []
    for prompt in (0, 1):
        true_gradients.append((CHANCES[prompt] * REWARDS[prompt]) @ GRADIENTS[prompt])
        for actions in product(range(ACTIONS), repeat=SAMPLES):
            measured, chance = batch((prompt,), actions)
            for name, advantage in estimators(measured, fitted).items():
                estimate = one_gradient(measured, prompt, actions, advantage)
                mean[name] += chance * estimate
                square[name] += chance * float(estimate.square().sum())
    found = dict.fromkeys(names, (0.0, 0.0))
    between, total = 0.0, 0.0
    for prompts in product((0, 1), repeat=2):
        for actions in product(range(ACTIONS), repeat=2 * SAMPLES):
            measured, chance = batch(prompts, actions)
            total += chance
            prompts_part = between_prompts(measured)
            assert prompts_part is not None
            between += chance * prompts_part
            for name, advantage in estimators(measured, fitted).items():
                variance, signal = variance_and_signal(measured, advantage)
                found[name] = (found[name][0] + chance * variance, found[name][1] + chance * signal)
    assert total == pytest.approx(1, abs=1e-12)
    for name in names:
        signal = float(mean[name].square().sum())
        assert found[name] == pytest.approx((square[name] - signal, signal), rel=1e-10), name
    spread = torch.stack(true_gradients)
    truth = float((spread - spread.mean(0)).square().sum(1).mean())
    assert between == pytest.approx(truth, rel=1e-10)


def test_two_samples_a_prompt_do_not_tell_prompts_apart() -> None:
    measured, _ = batch((0, 1), (0, 1, 0, 1, 0, 0))
    pairs = torch.tensor([0, 1, 3, 4])
    smaller = GradientGram(
        measured.gram[pairs][:, pairs], measured.rewards[pairs], measured.lengths[pairs],
        measured.groups[pairs], measured.energies.select(pairs),
    )  # fmt: skip
    assert between_prompts(smaller) is None and between_prompts(measured) is not None


def test_correlation_is_the_one_within_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(4).repeat_interleave(6)
    norms = torch.rand(24, generator=generator, dtype=torch.float64) + 10 * groups
    values = torch.rand(24, generator=generator, dtype=torch.float64) - 7 * groups
    measured = GradientGram(
        torch.diag(norms), torch.zeros(24), torch.ones(24), groups, EnergySums(values, values)
    )
    centred = [x.view(4, 6) - x.view(4, 6).mean(1, keepdim=True) for x in (norms, values)]
    expected = torch.corrcoef(torch.stack([x.flatten() for x in centred]))[0, 1]
    assert correlation(measured, values) == pytest.approx(float(expected), rel=1e-12)
    assert correlation(measured, measured.lengths) is None


def test_fitted_weights_choose_the_least_noise_and_restore_from_state() -> None:
    fitted = FittedWeights()
    measured, _ = batch((0, 1), (0, 1, 0, 1, 0, 0))
    first = fitted(measured.lengths, measured.energies)
    torch.testing.assert_close(first, measured.lengths)
    noises = []
    for weights in fitted.candidates(measured.lengths, measured.energies):
        estimates = []
        for prompt in (0, 1):
            w, r = (x.view(2, 3)[prompt] for x in (weights, measured.rewards))
            others = (w.sum() - w, (w * r).sum() - w * r)
            actions = ((0, 1, 0), (1, 0, 0))[prompt]
            estimates.append(one_gradient(measured, prompt, actions, r - others[1] / others[0]))
        noises.append(float(sum(e.square().sum() for e in estimates)))
    update_fitted(fitted, measured)
    assert len(CANDIDATES) == 15 and len(set(noises)) == 15
    best = min(range(15), key=noises.__getitem__)
    assert torch.equal(fitted.coefficients, CANDIDATES[best])
    other = FittedWeights()
    other.restore(fitted.state())
    again = batch((1, 0), (1, 1, 0, 0, 1, 0))[0]
    assert torch.equal(fitted(again.lengths, again.energies), other(again.lengths, again.energies))
    update_fitted(fitted, again)
    update_fitted(other, again)
    assert fitted.state() == other.state()


def test_energy_is_the_squared_norm_of_the_logit_gradient() -> None:
    logits = torch.randn(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    chosen = logits.argmax(1)
    probabilities = logits.softmax(1)
    expected = (torch.nn.functional.one_hot(chosen, 9) - probabilities).square().sum(1)
    log_prob = probabilities[torch.arange(50), chosen].log()
    torch.testing.assert_close(energy(log_prob, probabilities.square().sum(1)), expected)
    certain = torch.tensor([-3e-8, 0.0])
    assert (energy(certain, torch.tensor([0.99999994, 0.99999994])) >= 0).all()
