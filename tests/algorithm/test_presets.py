"""The presets of other methods: against plain Python, and against the numbers of their public code.

`tests/data/estimator_oracles/README.md` says whose numbers they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from statistics import fmean, variance

import numpy as np
import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import (
    AlgorithmConfig,
    Baseline,
    Center,
    Scale,
    Weight,
    keeps_zero_variance,
)
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.presets import config_of
from opo_megatron.algorithm.token_baselines import token_advantages
from tests.support.estimator_batches import BATCHES, EstimatorBatch, equal_batch, ragged_batch
from tests.support.paths import DATA

ORACLES = DATA / "estimator_oracles" / "advantages.npz"
TAU = 1.0


def groups_of(batch: EstimatorBatch) -> Iterator[list[int]]:
    """The samples of each prompt."""
    for group in sorted(set(batch.groups)):
        yield [i for i, other in enumerate(batch.groups) if other == group]


def by_group(batch: EstimatorBatch, of_group: Callable[[list[float]], list[float]]) -> list[float]:
    """`of_group(rewards) → advantages` of each prompt; one sample keeps its reward."""
    result = [0.0] * len(batch.rewards)
    for members in groups_of(batch):
        rewards = [batch.rewards[i] for i in members]
        advantages = of_group(rewards) if len(members) > 1 else rewards
        for i, advantage in zip(members, advantages, strict=True):
            result[i] = advantage
    return result


def minus_mean(rewards: list[float]) -> list[float]:
    return [r - fmean(rewards) for r in rewards]


def minus_logmeanexp(rewards: list[float]) -> list[float]:
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    baseline = TAU * math.log(fmean(math.exp(r / TAU) for r in rewards))
    return [(r - baseline) / (1 + TAU) for r in rewards]


def whitened(batch: EstimatorBatch, values: list[float]) -> list[float]:
    """Token by token, with 1e-8 added to the number of tokens."""
    tokens = [value for value, n in zip(values, batch.lengths, strict=True) for _ in range(n)]
    n = len(tokens)
    mean = math.fsum(tokens) / (n + 1e-8)
    squares = math.fsum((value - mean) ** 2 for value in tokens) / (n + 1e-8)
    return [(value - mean) / math.sqrt(squares * n / (n - 1) + 1e-8) for value in values]


def reinforce_rej(batch: EstimatorBatch) -> list[float]:
    return by_group(batch, lambda rewards: rewards if len(set(rewards)) > 1 else [0.0] * len(rewards))


def opmd(batch: EstimatorBatch) -> list[float]:
    return [a / (1 + TAU) for a in by_group(batch, minus_mean)]


def opmd_logmeanexp(batch: EstimatorBatch) -> list[float]:
    lone = {members[0] for members in groups_of(batch) if len(members) == 1}
    values = by_group(batch, minus_logmeanexp)
    return [a / (1 + TAU) if i in lone else a for i, a in enumerate(values)]


def james_stein(batch: EstimatorBatch) -> list[float]:
    prompts = [[batch.rewards[i] for i in members] for members in groups_of(batch)]
    result = []
    for p, rewards in enumerate(prompts):
        others = [other for q, other in enumerate(prompts) if q != p]
        means = [fmean(other) for other in others]
        noise = fmean([variance(other) / len(other) if len(other) > 1 else 0.0 for other in others])
        spread = fmean([(mean - fmean(means)) ** 2 for mean in means])
        share = noise / (noise + spread + 1e-6)
        for i, reward in enumerate(rewards):
            rest = rewards[:i] + rewards[i + 1 :]
            own = (1 - share) * fmean(rest) if rest else 0.0
            result.append(reward - own - (share if rest else 1.0) * fmean(means))
    return result


REFERENCES: dict[Baseline, Callable[[EstimatorBatch], list[float]]] = {
    Baseline.none: lambda batch: batch.rewards,
    Baseline.reinforce_plus_plus: lambda batch: whitened(batch, batch.rewards),
    Baseline.reinforce_plus_plus_baseline: lambda batch: whitened(batch, by_group(batch, minus_mean)),
    Baseline.asymre: lambda batch: by_group(batch, lambda rs: [a + 0.1 for a in minus_mean(rs)]),
    Baseline.opmd: opmd,
    Baseline.opmd_logmeanexp: opmd_logmeanexp,
    Baseline.raft: lambda batch: [max(r, 0.0) for r in batch.rewards],
    Baseline.reinforce_rej: reinforce_rej,
    Baseline.remax: lambda batch: [
        r - g for r, g in zip(batch.rewards, batch.greedy_rewards, strict=True)
    ],
    Baseline.maxrl: lambda batch: by_group(
        batch, lambda rs: [a / (fmean(rs) + 1e-6) for a in minus_mean(rs)]
    ),
    Baseline.rec: lambda batch: by_group(batch, minus_mean),
    Baseline.james_stein: james_stein,
}  # fmt: skip


def token_reference(batch: EstimatorBatch, leave_one_out: bool) -> list[float]:
    """Token by token: over the responses, or the other ones, that have this token."""
    cumulative = [list(accumulate(row)) for row in batch.energies]
    members_of = {i: members for members in groups_of(batch) for i in members}
    result = []
    for i, length in enumerate(batch.lengths):
        for t in range(length):
            alive = [j for j in members_of[i] if batch.lengths[j] > t]
            counted = [j for j in alive if j != i] if leave_one_out else alive
            total = sum(cumulative[j][t] for j in counted) + (0.0 if leave_one_out else 1e-8)
            baseline = 0.0
            if len(alive) > 1:
                baseline = sum(cumulative[j][t] * batch.rewards[j] for j in counted) / total
            result.append(batch.rewards[i] - baseline)
    return result


def tensors(batch: EstimatorBatch) -> tuple[Tensor, Tensor, Tensor]:
    rewards = torch.tensor(batch.rewards, dtype=torch.float64)
    return rewards, torch.tensor(batch.lengths), torch.tensor(batch.groups)


def advantages_of(config: AlgorithmConfig, batch: EstimatorBatch) -> Tensor:
    greedy = torch.tensor(batch.greedy_rewards, dtype=torch.float64)
    return compute_advantages(config, *tensors(batch), greedy_rewards=greedy)


def token_advantages_of(config: AlgorithmConfig, batch: EstimatorBatch) -> Tensor:
    energies = torch.tensor([e for row in batch.energies for e in row], dtype=torch.float64)
    return token_advantages(config, *tensors(batch), energies)


def close(result: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12, equal_nan=False
    )


@pytest.mark.parametrize("preset", REFERENCES)
def test_a_preset_equals_its_definition_sample_by_sample_on_200_batches(preset: Baseline) -> None:
    for seed in range(BATCHES):
        batch = ragged_batch(seed)
        close(advantages_of(config_of(preset), batch), REFERENCES[preset](batch))


@pytest.mark.parametrize("preset", [Baseline.otb, Baseline.otb_loo])
def test_a_token_baseline_equals_its_definition_on_200_batches(preset: Baseline) -> None:
    for seed in range(BATCHES):
        batch = ragged_batch(seed)
        close(token_advantages_of(config_of(preset), batch), token_reference(batch, "loo" in preset.value))


WITH_ORACLE = [*(preset for preset in REFERENCES if preset is not Baseline.none), Baseline.otb]


@pytest.mark.parametrize("preset", WITH_ORACLE)
def test_a_preset_has_the_numbers_of_its_public_implementation(preset: Baseline) -> None:
    expected = torch.from_numpy(np.load(ORACLES)[preset.value])
    config = config_of(preset)
    if preset is Baseline.otb:
        results = [token_advantages_of(config, ragged_batch(seed)) for seed in range(BATCHES)]
    else:
        make = equal_batch if preset is Baseline.james_stein else ragged_batch
        results = [advantages_of(config, make(seed)) for seed in range(BATCHES)]
    is_defined = ~expected.isnan()
    assert bool(is_defined.all()) or preset is Baseline.rec
    result = torch.cat(results)
    assert result.shape == expected.shape
    torch.testing.assert_close(result[is_defined], expected[is_defined], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("preset", [Baseline.opo_loo, Baseline.energy_loo])
def test_shrinkage_takes_the_weights_of_any_leave_one_out_baseline(preset: Baseline) -> None:
    """(1 − λ) b₋ᵢ + λ m, with both from weighted means; v is the squared standard error of such a mean."""
    for seed in range(40):
        batch = ragged_batch(seed)
        weights = [float(n) for n in batch.lengths]
        if preset is Baseline.energy_loo:
            weights = [sum(row) for row in batch.energies]
        prompts = list(groups_of(batch))
        stats = []
        for members in prompts:
            total = sum(weights[i] for i in members)
            mean = sum(weights[i] * batch.rewards[i] for i in members) / total
            squares = sum((weights[i] * (batch.rewards[i] - mean)) ** 2 for i in members)
            stats.append((mean, squares / total**2 * len(members) / max(1, len(members) - 1)))
        expected = []
        for p, members in enumerate(prompts):
            others = [stat for q, stat in enumerate(stats) if q != p]
            target, noise = fmean(mean for mean, _ in others), fmean(error for _, error in others)
            spread = fmean((mean - target) ** 2 for mean, _ in others)
            share = noise / (noise + spread + 1e-6)
            for i in members:
                rest = [j for j in members if j != i]
                own, part = 0.0, 1.0
                if rest:
                    part = share
                    own = sum(weights[j] * batch.rewards[j] for j in rest) / sum(weights[j] for j in rest)
                expected.append(batch.rewards[i] - (1 - part) * own - part * target)
        sums = torch.tensor([sum(row) for row in batch.energies], dtype=torch.float64)
        config = config_of(preset, shrink=True, keep_lone=True)
        result = compute_advantages(config, *tensors(batch), energies=EnergySums(sums, sums))
        close(result, expected)


def test_a_single_prompt_has_nothing_to_shrink_towards() -> None:
    rewards, lengths, groups = torch.tensor([1.0, 0.0, 0.5]).double(), torch.ones(3), torch.zeros(3).long()
    shrunken = compute_advantages(config_of(Baseline.james_stein), rewards, lengths, groups)
    assert torch.equal(shrunken, compute_advantages(config_of(Baseline.rloo), rewards, lengths, groups))


KEEPS = {
    Baseline.none, Baseline.reinforce_plus_plus, Baseline.reinforce_plus_plus_baseline, Baseline.asymre,
    Baseline.raft, Baseline.remax, Baseline.otb, Baseline.otb_loo, Baseline.james_stein,
}  # fmt: skip


@pytest.mark.parametrize("preset", Baseline)
def test_switches_tell_what_keeps_a_gradient_in_agreeing_groups(preset: Baseline) -> None:
    """One group agrees, the other does not; lengths differ, so that one response outlives the others."""
    assert keeps_zero_variance(config_of(preset)) == (preset in KEEPS)
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 0]).double()
    lengths, groups = torch.tensor([2, 3, 5, 2, 2, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    energies = torch.linspace(0.1, 1, 15, dtype=torch.float64)
    config = config_of(preset)
    if config.center is Center.token_mean:
        own = token_advantages(config, rewards, lengths, groups, energies)[:10]
    else:
        sums = EnergySums(lengths.double(), lengths.double())
        if config.weight is Weight.fitted:
            config = config_of(preset, weight=Weight.length)
        greedy = torch.zeros(6)
        own = compute_advantages(config, rewards, lengths, groups, sums, greedy_rewards=greedy)[:3]
    if preset is Baseline.batch_length:  # its scope, the batch, does not agree
        return
    assert bool(own.any()) == (preset in KEEPS)


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"shift": 0.25}, [0.25, -0.75]),
        ({"positive_only": True}, [0.5, -0.5]),
        ({"center": Center.none, "shift": 0.5}, [0.5, -0.5]),
        ({"center": Center.none, "scale": Scale.std}, [1 / (0.5**0.5 + 1e-6), 0.0]),
        ({"scale": Scale.std, "shift": 0.5}, [0.0, -1 / (0.5**0.5 + 1e-6)]),
        ({"scale": Scale.mean}, [0.5 / (0.5 + 1e-6), -0.5 / (0.5 + 1e-6)]),
        ({"scale": Scale.one_plus_tau, "tau": 3.0}, [0.125, -0.125]),
    ],
)
def test_switches_combine_as_the_formula_says(switches: dict[str, object], expected: list[float]) -> None:
    config = config_of(Baseline.group_mean, **switches)
    rewards, groups = torch.tensor([1.0, 0.0]).double(), torch.zeros(2, dtype=torch.int64)
    close(compute_advantages(config, rewards, torch.tensor([3, 4]), groups), expected)
