"""Exact expectations of gradient estimators on trees of responses of up to three tokens, which stop early.

The policy has logits of its own at every prefix.  All batches of K responses to one or two prompts are
enumerated, each with its probability; the normalizer is constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate, product

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, Baseline, Center, LossNormalizer, Weight
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.fitted_weights import FittedWeights
from opo_megatron.algorithm.objective import PolicyGradient, loss_normalizer
from opo_megatron.algorithm.presets import config_of
from opo_megatron.algorithm.token_baselines import token_advantages

LONGEST = 3
STOP = 0
REWARDS = (0.0, 1.0, 0.25, 1.0, 0.0, 1.0)
"""Of the responses in their order, again and again: many ties."""


@dataclass(frozen=True)
class Tree:
    """All responses to one prompt, float64."""

    probabilities: Tensor
    """[R]."""
    rewards: Tensor
    """[R]."""
    lengths: Tensor
    """[R]."""
    scores: list[Tensor]
    """[R] of [length, parameters]: ∇ log π of each token."""
    energies: list[list[float]]
    """[R][length]."""

    @property
    def gradient(self) -> Tensor:
        """∇ E[r]."""
        terms = zip(self.probabilities, self.rewards, self.scores, strict=True)
        return torch.stack([p * r * s.sum(0) for p, r, s in terms]).sum(0)

    def energy_sums(self) -> Tensor:
        return torch.tensor([sum(row) for row in self.energies], dtype=torch.float64)


@cache
def tree(symbols: int, seed: int) -> Tree:
    """The tree of a policy over `symbols` tokens, one of which stops."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(LONGEST) for p in product(range(1, symbols), repeat=n)]
    node = {prefix: i for i, prefix in enumerate(prefixes)}
    policy = torch.randn(len(prefixes), symbols, generator=generator, dtype=torch.float64).softmax(1)
    responses = [(*p, STOP) for p in prefixes]
    responses += list(product(range(1, symbols), repeat=LONGEST))
    scores, energies, probabilities = [], [], []
    for response in responses:
        rows, sizes, probability = [], [], 1.0
        for t, token in enumerate(response):
            at = node[response[:t]]
            score = -policy[at].clone()
            score[token] += 1
            row = torch.zeros_like(policy)
            row[at] = score
            rows.append(row.flatten())
            sizes.append(float(score.square().sum()))
            probability *= float(policy[at, token])
        scores.append(torch.stack(rows))
        energies.append(sizes)
        probabilities.append(probability)
    return Tree(
        torch.tensor(probabilities, dtype=torch.float64),
        torch.tensor([REWARDS[(i + seed) % len(REWARDS)] for i in range(len(responses))]).double(),
        torch.tensor([len(response) for response in responses]),
        scores,
        energies,
    )


def with_constant(config: AlgorithmConfig, samples: int) -> AlgorithmConfig:
    config.loss_normalizer, config.loss_constant = LossNormalizer.constant, float(samples)
    return config


def gradient_of(config: AlgorithmConfig, scores: Tensor, advantages: Tensor, lengths: Tensor) -> Tensor:
    """−∇loss of some tokens [n, parameters] with advantages [n], by the project's objective."""
    objective = PolicyGradient(loss_normalizer(config, lengths), temperature=1.0)
    _, d_log_prob = objective(torch.zeros_like(advantages), {"advantages": advantages})
    return -d_log_prob @ scores


# ---------------------------------------------------------------------- a baseline for each token


def expected_by_tokens(config: AlgorithmConfig, one: Tree, samples: int) -> Tensor:
    """E[−∇loss] over all batches of one prompt and `samples` responses."""
    with_constant(config, samples)
    batches = list(product(range(len(one.lengths)), repeat=samples))
    flat = [response for batch in batches for response in batch]
    lengths = one.lengths[flat]
    energies = torch.tensor([e for response in flat for e in one.energies[response]], dtype=torch.float64)
    groups = torch.arange(len(batches)).repeat_interleave(samples)
    advantages = token_advantages(config, one.rewards[flat], lengths, groups, energies)
    weight = one.probabilities[torch.tensor(batches)].prod(1)[groups]
    assert float(weight.sum()) == pytest.approx(samples, abs=1e-12)
    per_token = torch.repeat_interleave(weight, lengths) * advantages
    return gradient_of(config, torch.cat([one.scores[response] for response in flat]), per_token, lengths)


@pytest.mark.parametrize(("symbols", "samples"), [(2, 1), (2, 2), (2, 4), (3, 2), (3, 3)])
def test_otb_loo_is_unbiased(symbols: int, samples: int) -> None:
    one = tree(symbols, 0)
    expected = expected_by_tokens(config_of(Baseline.otb_loo), one, samples)
    torch.testing.assert_close(expected, one.gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("symbols", "samples"), [(2, 2), (2, 3), (2, 4), (3, 2)])
def test_advantage_0_where_no_other_response_is_left_is_a_bias(symbols: int, samples: int) -> None:
    one = tree(symbols, 0)
    expected = expected_by_tokens(config_of(Baseline.otb_loo, keep_lone=False), one, samples)
    assert float((expected - one.gradient).abs().max()) > 1e-3


@pytest.mark.parametrize("samples", [2, 3])
def test_the_bias_of_otb_is_its_own_reward_in_its_baseline(samples: int) -> None:
    """E Σ_t (r₁ − Σ_i W_i r_i / (Σ_i W_i + 1e-8)) ∇log π₁ₜ, by loops without the project's code."""
    one = tree(3, 0)
    count = len(one.lengths)
    cumulative = [list(accumulate(row)) for row in one.energies]
    rewards, probabilities = one.rewards.tolist(), one.probabilities.tolist()
    expected = torch.zeros_like(one.gradient)
    for first in range(count):
        for others in product(range(count), repeat=samples - 1):
            probability = probabilities[first]
            for other in others:
                probability *= probabilities[other]
            for t in range(len(cumulative[first])):
                alive = [i for i in (first, *others) if len(cumulative[i]) > t]
                total = sum(cumulative[i][t] for i in alive) + 1e-8
                baseline = sum(cumulative[i][t] * rewards[i] for i in alive) / total
                baseline = baseline if len(alive) > 1 else 0.0
                expected += probability * (rewards[first] - baseline) * one.scores[first][t]
    result = expected_by_tokens(config_of(Baseline.otb), one, samples)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert float((result - one.gradient).abs().max()) > 1e-3


# ---------------------------------------------------------------------- two prompts


def expected_of_two_prompts(config: AlgorithmConfig, samples: int, own_share: bool = False) -> Tensor:
    """E[−∇loss] of both prompts over all batches of two prompts with `samples` responses each.

    Args:
        own_share: a control: each prompt shrinks by a λ of its own rewards.
    """
    trees = (tree(2, 0), tree(2, 1))
    with_constant(config, samples)
    fitted = FittedWeights()
    fitted.restore({"means": [1, 2.2, 0.9], "noise": [0] * 15, "coefficients": [0.25, 0.25, 0.5]})
    groups = torch.arange(2).repeat_interleave(samples)
    parameters = len(trees[0].gradient)
    total = torch.zeros(2 * parameters, dtype=torch.float64)
    sums = [one.energy_sums() for one in trees]
    scores = [torch.stack([s.sum(0) for s in one.scores]) for one in trees]
    mass = 0.0
    for batch in product(range(len(trees[0].lengths)), repeat=2 * samples):
        parts = (list(batch[:samples]), list(batch[samples:]))
        rewards, lengths, energy, probability = (
            torch.cat([values[part] for values, part in zip(of_trees, parts, strict=True)])
            for of_trees in (
                [one.rewards for one in trees],
                [one.lengths for one in trees],
                sums,
                [one.probabilities for one in trees],
            )
        )
        advantages = compute_advantages(
            config, rewards, lengths, groups, EnergySums(energy, energy**2), fitted
        )
        if own_share:
            advantages = _with_own_share(rewards, groups)
        weight = float(probability.prod())
        mass += weight
        for p, part in enumerate(parts):
            own = slice(p * parameters, (p + 1) * parameters)
            inside = groups == p
            total[own] += weight * gradient_of(config, scores[p][part], advantages[inside], lengths)
    assert mass == pytest.approx(1, abs=1e-12)
    return total


def _with_own_share(rewards: Tensor, groups: Tensor) -> Tensor:
    """Shrinks by a λ of the prompt's own rewards."""
    result = torch.empty_like(rewards)
    for p in (0, 1):
        own, other = rewards[groups == p], rewards[groups != p]
        noise = own.var() / len(own)
        share = noise / (noise + (own.mean() - other.mean()) ** 2 + 1e-6)
        rest = (own.sum() - own) / (len(own) - 1)
        result[groups == p] = own - (1 - share) * rest - share * other.mean()
    return result


def truth() -> Tensor:
    return torch.cat([tree(2, 0).gradient, tree(2, 1).gradient])


@pytest.mark.parametrize("weight", Weight)
def test_james_stein_is_unbiased_on_every_weight(weight: Weight) -> None:
    config = config_of(Baseline.james_stein, weight=weight)
    torch.testing.assert_close(expected_of_two_prompts(config, 2), truth(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_james_stein_is_unbiased_with_one_and_three_samples(samples: int) -> None:
    config = config_of(Baseline.james_stein)
    torch.testing.assert_close(expected_of_two_prompts(config, samples), truth(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", [Baseline.none, Baseline.rloo, Baseline.opo_loo])
def test_baselines_without_the_own_reward_are_unbiased_on_trees(baseline: Baseline) -> None:
    config = config_of(baseline)
    assert config.center in (Center.none, Center.mean)
    torch.testing.assert_close(expected_of_two_prompts(config, 2), truth(), rtol=0, atol=1e-12)


def test_a_share_of_the_own_rewards_or_a_baseline_with_them_is_a_bias() -> None:
    """What the tests above must be able to tell."""
    own_share = expected_of_two_prompts(config_of(Baseline.james_stein), 2, own_share=True)
    assert float((own_share - truth()).abs().max()) > 1e-3
    opo = expected_of_two_prompts(config_of(Baseline.opo), 2)
    assert float((opo - truth()).abs().max()) > 1e-3
