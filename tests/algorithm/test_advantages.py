"""Advantages: every preset against a per-sample loop, in exact fractions where the formula is rational."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import STD_EPSILON, compute_advantages, zero_variance
from opo_megatron.algorithm.config import Baseline, Scope, Weight
from opo_megatron.algorithm.energy import EnergySums
from opo_megatron.algorithm.fitted_weights import FittedWeights
from opo_megatron.algorithm.presets import PRESETS, config_of

SEEDS = range(5)
PRESETS_OF_MEANS = list(Baseline)[: list(Baseline).index(Baseline.none)]
"""Those whose advantages are rewards minus a mean; the others are in test_presets.py."""
MIXTURE = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 4))
"""Coefficients of 1, length and energy in the weights of `auto`."""


def ragged(seed: int, prompts: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (multiples of 1/8, exact as fractions), lengths and shuffled, non-contiguous group ids."""
    rng = random.Random(seed)
    groups = [g * 7 - 3 for g in range(prompts) for _ in range(rng.randint(1, 9))]
    rng.shuffle(groups)
    rewards = [rng.randint(-8, 8) / 8 for _ in groups]
    lengths = [rng.randint(0, 40) for _ in groups]
    return torch.tensor(rewards), torch.tensor(lengths), torch.tensor(groups)


def energies_of(lengths: Tensor) -> dict[str, Any]:
    """Energies (multiples of 1/8) that do not depend on length alone, and fitted weights that mix them."""
    energy = (lengths * 3 + torch.arange(len(lengths)) % 5 * (lengths > 0)).double() / 8
    fitted = FittedWeights()
    fitted.coefficients = torch.tensor([float(c) for c in MIXTURE], dtype=torch.float64)
    return {"energies": EnergySums(energy, 2 * energy), "fitted": fitted}


def exact_weight(preset: Baseline, length: int, energy: float) -> Fraction:
    values = {Weight.one: Fraction(1), Weight.length: Fraction(length), Weight.energy: Fraction(energy)}
    values[Weight.fitted] = sum((c * x for c, x in zip(MIXTURE, values.values(), strict=True)), Fraction(0))
    return values[PRESETS[preset].weight]


def exact_mean(weights: list[Fraction], rewards: list[Fraction]) -> Fraction | None:
    """Weighted mean; the plain mean where all weights are 0; None of an empty list."""
    if not rewards:
        return None
    if sum(weights) == 0:
        weights = [Fraction(1)] * len(weights)
    return sum((w * r for w, r in zip(weights, rewards, strict=True)), Fraction(0)) / sum(weights)


def reference_advantages(preset: Baseline, rewards: Tensor, lengths: Tensor, groups: Tensor) -> list[float]:
    """Reference implementation: the definition, sample by sample."""
    exact = [Fraction(r) for r in rewards.double().tolist()]
    energies = energies_of(lengths)["energies"].energy.tolist()
    weights = [exact_weight(preset, *pair) for pair in zip(lengths.tolist(), energies, strict=True)]
    ids = groups.tolist()
    result = []
    for i, group in enumerate(ids):
        members = [j for j in range(len(ids)) if PRESETS[preset].scope is Scope.batch or ids[j] == group]
        if len({exact[j] for j in members}) == 1:
            result.append(0.0)
            continue
        scope_weights = {j: weights[j] for j in members}
        if sum(scope_weights.values()) == 0:
            scope_weights = dict.fromkeys(members, Fraction(1))
        if PRESETS[preset].leave_one_out:
            members = [j for j in members if j != i]
            if sum(scope_weights[j] for j in members) == 0:
                result.append(0.0)
                continue
        baseline = exact_mean([scope_weights[j] for j in members], [exact[j] for j in members])
        assert baseline is not None
        advantage = float(exact[i] - baseline)
        if preset is Baseline.grpo:
            own = [exact[j] for j in range(len(ids)) if ids[j] == group]
            mean = sum(own, Fraction(0)) / len(own)
            variance = sum(((r - mean) ** 2 for r in own), Fraction(0)) / max(1, len(own) - 1)
            advantage /= math.sqrt(variance) + STD_EPSILON
        result.append(advantage)
    return result


@pytest.mark.parametrize("preset", PRESETS_OF_MEANS)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_preset_equals_its_definition_in_exact_fractions(preset: Baseline, seed: int) -> None:
    batch = ragged(seed)
    expected = torch.tensor(reference_advantages(preset, *batch), dtype=torch.float64)
    result = compute_advantages(config_of(preset), *batch, **energies_of(batch[1]))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.6])
def test_length_power_weights_by_a_power_of_the_length(exponent: float) -> None:
    rewards, lengths = torch.tensor([1.0, 0.0, 0.5]), torch.tensor([2, 5, 9])
    config = config_of(Baseline.opo, weight=Weight.length_power, length_exponent=exponent)
    weights = [length**exponent for length in lengths.tolist()]
    baseline = sum(w * r for w, r in zip(weights, rewards.tolist(), strict=True)) / sum(weights)
    expected = rewards.double() - baseline
    torch.testing.assert_close(
        compute_advantages(config, rewards, lengths, torch.zeros(3, dtype=torch.int64)), expected
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_length_weighted_opo_advantages_sum_to_zero_in_every_group(seed: int) -> None:
    rewards, lengths, groups = ragged(seed)
    weighted = compute_advantages(config_of(Baseline.opo), rewards, lengths, groups) * lengths
    for group in groups.unique():
        if lengths[groups == group].sum() > 0:
            assert abs(float(weighted[groups == group].sum())) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_opo_is_its_leave_one_out_form_times_a_per_sample_factor(seed: int) -> None:
    """A_i = (1 − w_i/W)(r_i − b_{−i}), hence A_loo = A·W/(W − w_i)."""
    rewards, lengths, groups = ragged(seed)
    plain = compute_advantages(config_of(Baseline.opo), rewards, lengths, groups)
    leave_one_out = compute_advantages(config_of(Baseline.opo_loo), rewards, lengths, groups)
    total = torch.stack([lengths[groups == g].sum() for g in groups]).double()
    others = total - lengths
    defined = others > 0
    assert defined.sum() > 10
    others = others[defined]
    torch.testing.assert_close(
        leave_one_out[defined], plain[defined] * total[defined] / others, rtol=1e-12, atol=1e-12
    )
    for i in defined.nonzero()[:, 0].tolist():
        rest = groups == groups[i]
        rest[i] = False
        baseline = float((rewards * lengths)[rest].double().sum() / lengths[rest].sum())
        expected = (1 - float(lengths[i] / total[i])) * (float(rewards[i]) - baseline)
        assert float(plain[i]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("preset", [p for p in PRESETS_OF_MEANS if p is not Baseline.batch_length])
def test_a_group_of_one_has_advantage_zero(preset: Baseline) -> None:
    lengths = torch.tensor([4, 0])
    got = compute_advantages(
        config_of(preset), torch.tensor([0.7, 3.0]), lengths, torch.tensor([5, 1]), **energies_of(lengths)
    )
    assert got.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [(Baseline.opo, [0.75, -0.25, -0.25, -0.25]), (Baseline.opo_loo, [1.0, -1 / 3, -1 / 3, -1 / 3])],
)
def test_a_group_of_empty_responses_weights_them_equally(preset: Baseline, expected: list[float]) -> None:
    rewards, lengths = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)
    got = compute_advantages(config_of(preset), rewards, lengths, torch.zeros(4, dtype=torch.int64))
    assert got.tolist() == pytest.approx(expected, abs=1e-15)


def test_a_sample_with_all_the_weight_is_its_own_baseline() -> None:
    rewards, lengths = torch.tensor([1.0, 0.25, 0.5]), torch.tensor([6, 0, 0])
    groups = torch.zeros(3, dtype=torch.int64)
    assert compute_advantages(config_of(Baseline.opo), rewards, lengths, groups).tolist() == [0, -0.75, -0.5]
    assert compute_advantages(config_of(Baseline.opo_loo), rewards, lengths, groups).tolist() == [
        0,
        -0.75,
        -0.5,
    ]


@pytest.mark.parametrize("preset", PRESETS_OF_MEANS)
def test_equal_rewards_give_exactly_zero_despite_rounding(preset: Baseline) -> None:
    lengths = torch.arange(21) * 13 % 17
    for reward in (0.0, 0.1, 1 / 3, -0.7, 1e-300, 1e15 + 0.3):
        rewards = torch.full((21,), reward, dtype=torch.float64)
        result = compute_advantages(
            config_of(preset), rewards, lengths, torch.arange(21) // 7, **energies_of(lengths)
        )
        assert not result.any()


def test_zero_variance_groups_are_those_with_equal_rewards() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2, 5.0])
    groups = torch.tensor([3, 8, 3, 8, 8, 1])
    is_zero_variance = zero_variance(config_of(Baseline.opo), rewards, groups)
    assert is_zero_variance.tolist() == [True, False, True, False, False, True]
    assert not zero_variance(config_of(Baseline.batch_length), rewards, groups).any()


def test_standard_deviation_has_the_baselines_scope() -> None:
    """A zero-variance group's standard deviation, 0, must not divide deviations from the batch's mean."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    config = config_of(Baseline.grpo, scope=Scope.batch)
    got = compute_advantages(config, rewards, torch.ones(6), torch.arange(6) // 2)
    torch.testing.assert_close(got, (rewards - 0.5) / (rewards.std() + STD_EPSILON))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_batch_scope_treats_the_batch_as_one_group(leave_one_out: bool) -> None:
    rewards, lengths, groups = ragged(9)
    over_batch = config_of(Baseline.batch_length, leave_one_out=leave_one_out)
    over_group = config_of(Baseline.opo, leave_one_out=leave_one_out)
    got = compute_advantages(over_batch, rewards, lengths, groups)
    assert torch.equal(got, compute_advantages(over_group, rewards, lengths, torch.zeros_like(groups)))
    assert not torch.equal(got, compute_advantages(over_group, rewards, lengths, groups))


@pytest.mark.parametrize("weight", [Weight.one, Weight.length, Weight.length_power])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("preset", [Baseline.opo, Baseline.batch_length, Baseline.grpo])
def test_advantages_are_never_nan_and_bounded_by_the_range_of_rewards(
    preset: Baseline, leave_one_out: bool, weight: Weight
) -> None:
    """A baseline is a mean, so |A| ≤ max r − min r without scaling; lengths span 10 orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    config = config_of(preset, leave_one_out=leave_one_out, weight=weight)
    for n in (0, 1, 2, 5, 64):
        rewards = torch.rand(n, generator=generator).double()
        lengths = torch.tensor([0, 1, 2, 30_000, 10**10])[torch.randint(5, (n,), generator=generator)]
        groups = torch.randint(0, 5, (n,), generator=generator)
        got = compute_advantages(config, rewards, lengths, groups)
        assert got.shape == (n,) and bool(torch.isfinite(got).all())
        if preset is not Baseline.grpo:
            assert bool((got.abs() <= 1 + 1e-6).all())


def test_leave_one_out_of_nearly_all_the_weight_is_the_mean_of_the_others() -> None:
    rewards, lengths = torch.tensor([0.5, 0.0, 1.0]).double(), torch.tensor([10**10, 1, 2])
    config = config_of(Baseline.opo_loo, weight=Weight.length_power)
    got = compute_advantages(config, rewards, lengths, torch.zeros(3, dtype=torch.int64))
    others = 2**1.6 / (1 + 2**1.6)
    assert got.tolist() == pytest.approx([0.5 - others, -0.5, 0.5], rel=1e-6)
