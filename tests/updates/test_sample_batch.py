"""Batches filled with groups that have a signal: expectations by enumeration, and whole runs."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages, zero_variance
from opo_megatron.algorithm.config import Baseline, LossNormalizer
from opo_megatron.algorithm.objective import PolicyGradient, loss_normalizer
from opo_megatron.algorithm.presets import config_of
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.updates.sample_batch import choose_groups
from tests.support.tiny_run import ONE_STEP, easy_reward, lasting, rows, train

SAMPLES, PER_STEP, ROUNDS = 2, 2, 2
BLOCK = PER_STEP * ROUNDS
POLICIES = torch.tensor([[0.3, 0.7], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64)
"""[kind of prompt, action]."""
REWARDS = torch.tensor([[1.0, 0.0], [0.25, 1.0], [0.5, 0.5]], dtype=torch.float64)
"""The last kind of prompt never has a signal."""
LENGTHS = torch.tensor([2, 5])
CONFIG = config_of(
    Baseline.opo, loss_normalizer=LossNormalizer.constant, loss_constant=float(SAMPLES * PER_STEP)
)


@cache
def outcomes(kind: int) -> list[tuple[float, bool, Tensor]]:
    """(probability, has a signal, part of the step's gradient) of each group of a prompt of this kind."""
    result = []
    scores = torch.zeros(2, 3, 2, dtype=torch.float64)
    scores[:, kind] = torch.eye(2, dtype=torch.float64) - POLICIES[kind]
    for actions in product(range(2), repeat=SAMPLES):
        rewards, groups = REWARDS[kind, list(actions)], torch.zeros(SAMPLES, dtype=torch.int64)
        lengths = LENGTHS[list(actions)]
        advantages = compute_advantages(CONFIG, rewards, lengths, groups)
        objective = PolicyGradient(loss_normalizer(CONFIG, lengths), temperature=1.0)
        _, d_log_prob = objective(torch.zeros(SAMPLES), {"advantages": advantages})
        gradient = -d_log_prob @ scores[list(actions)].flatten(1)
        signal = not bool(zero_variance(CONFIG, rewards, groups).any())
        result.append((float(POLICIES[kind, list(actions)].prod()), signal, gradient))
    return result


def chance_of_signal(kind: int) -> float:
    return sum(probability for probability, signal, _ in outcomes(kind) if signal)


def gradient_with_signal(kind: int) -> Tensor:
    """E[part of the gradient | signal]; groups without have none."""
    terms = [probability * gradient for probability, signal, gradient in outcomes(kind) if signal]
    return torch.stack(terms).sum(0) / chance_of_signal(kind) if terms else torch.zeros(6).double()


def filled(signals: tuple[bool, ...]) -> list[int]:
    """The groups of a block that are taken, for whether each has a signal."""
    groups = torch.arange(len(signals)).repeat_interleave(SAMPLES)
    is_zero = ~torch.tensor(signals).repeat_interleave(SAMPLES)
    return choose_groups(groups, is_zero, PER_STEP)


def expected_over_kinds(chances: dict[tuple[int, ...], float]) -> Tensor:
    """E of the filled batch's gradient, for the probability of each sequence of kinds in a block."""
    total = torch.zeros(6, dtype=torch.float64)
    for kinds, chance in chances.items():
        for signals in product((True, False), repeat=BLOCK):
            weight = chance
            for kind, signal in zip(kinds, signals, strict=True):
                weight *= chance_of_signal(kind) if signal else 1 - chance_of_signal(kind)
            if weight:
                for group in filled(signals):
                    if signals[group]:
                        total += weight * gradient_with_signal(kinds[group])
    return total


def plain_direction() -> Tensor:
    """The gradient of plain OPO, up to a factor: kinds are equally likely."""
    terms = [probability * gradient for kind in range(3) for probability, _, gradient in outcomes(kind)]
    return torch.stack(terms).sum(0)


def angle(a: Tensor, b: Tensor) -> float:
    """Between two directions, in radians; exact for small angles."""
    a, b = a / a.norm(), b / b.norm()
    return 2 * math.asin(min(1.0, float((a - b).norm()) / 2))


def test_filling_keeps_the_gradient_s_direction_for_independent_prompts() -> None:
    chances = dict.fromkeys(product(range(3), repeat=BLOCK), 1 / 3**BLOCK)
    expected = expected_over_kinds(chances)
    assert angle(expected, plain_direction()) < 1e-12
    plain = PER_STEP * plain_direction() / 3
    assert float(expected.norm() / plain.norm()) > 1.2, "more groups have a signal"


def test_a_choice_by_more_than_the_signal_would_turn_the_gradient() -> None:
    """A control: a choice that looks at more than whether there is a signal."""
    total = torch.zeros(6, dtype=torch.float64)
    for kind in range(3):
        for probability, signal, gradient in outcomes(kind):
            if signal and kind != 1:
                total += probability * gradient
    assert angle(total, plain_direction()) > 0.1


def permutation_angle(prompts: int) -> float:
    """Angle to plain OPO where a block is the beginning of a permutation of a set with all kinds alike."""
    share, chances = prompts // 3, {}
    for kinds in product(range(3), repeat=BLOCK):
        left, chance = [share] * 3, 1.0
        for position, kind in enumerate(kinds):
            chance *= left[kind] / (prompts - position)
            left[kind] -= 1
        chances[kinds] = chance
    return angle(expected_over_kinds(chances), plain_direction())


def test_the_deviation_of_a_permutation_falls_with_its_size() -> None:
    """As in docs/estimators.md: about 1/M for M prompts."""
    angles = {prompts: permutation_angle(prompts) for prompts in (6, 12, 24, 48, 96)}
    assert angles[6] > 1e-3
    for prompts, value in list(angles.items())[:-1]:
        assert 1.8 < value / angles[2 * prompts] < 3.2
    print({prompts: round(value, 5) for prompts, value in angles.items()})


@pytest.mark.parametrize(
    ("signals", "taken"),
    [
        ((True, True, True, True), [0, 1]),
        ((False, True, False, True), [1, 3]),
        ((False, False, True, False), [0, 2]),
        ((False, False, False, False), [0, 1]),
        ((True, False, False, True), [0, 3]),
    ],
)
def test_the_first_groups_with_signal_are_taken_then_those_without(
    signals: tuple[bool, ...], taken: list[int]
) -> None:
    assert filled(signals) == taken


# ---------------------------------------------------------------------- runs

WITHOUT_EVAL = ("eval.every_steps=0", "eval.problems=1", "eval.greedy=false", "observe.kl=off")
FILL = ("rollout.fill=groups_with_signal", "rollout.fill_rounds=3", "rollout.samples_per_prompt=2")


def rarely(self: LiftTask, prompt: object, response: list[int]) -> float:
    return float(sum(response) % 4 == 0)


@pytest.fixture
def rare_reward(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(LiftTask, "reward", rarely)
    yield


def rollouts_of(run_dir: Path, step: int) -> Rollouts:
    return Rollouts.load(run_dir / "rollouts" / f"step_{step:08d}.safetensors")


def test_a_filled_run_has_current_weights_and_resumes_bitwise(tmp_path: Path, rare_reward: None) -> None:
    run_dir, resumed = tmp_path / "run", tmp_path / "resumed"
    assert train(run_dir, *FILL, *WITHOUT_EVAL) == 0
    for row in rows(run_dir)[1:]:
        rollouts = rollouts_of(run_dir, row["step"])
        assert rollouts.groups.tolist() == [g for g in range(6) for _ in range(2)]
        assert set(rollouts.weight_versions.tolist()) == {6 + row["step"] - 1}
        assert row["fill/groups_sampled"] == 6 * row["fill/rounds"]
    metrics = rows(run_dir)[1:]
    assert any(row["fill/rounds"] > 1 for row in metrics)
    # The unchosen groups are left out, so that fewer of the batch are without signal than were sampled.
    assert any(row["reward/mean"] != row["fill/reward_mean"] for row in metrics)
    shutil.copytree(run_dir, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000004")
    assert train(resumed, *FILL, *WITHOUT_EVAL, "resume=auto") == 0
    assert lasting(resumed) == lasting(run_dir)
    for step in (3, 4):
        was, now = rollouts_of(run_dir, step), rollouts_of(resumed, step)
        assert torch.equal(was.response_tokens, now.response_tokens)
        assert torch.equal(was.prompt_ids, now.prompt_ids)


def test_a_greedy_baseline_is_the_reward_of_the_greedy_response(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiftTask, "reward", easy_reward)
    every = ("algorithm.variance_every=1", "algorithm.variance_prompts=4")
    assert train(tmp_path / "run", "algorithm.baseline=remax", *ONE_STEP, *every) == 0
    rollouts = rollouts_of(tmp_path / "run", 1)
    baselines = rollouts.rewards - rollouts.advantages
    for group in range(6):
        assert len(baselines[rollouts.groups == group].unique()) == 1
    assert set(baselines.tolist()) <= {0.0, 1.0}
    row = rows(tmp_path / "run")[1]
    assert row["variance/remax"] == row["variance/this_run"]
