"""Replayed responses: formulas against plain Python in float64, what is kept and chosen, resumed runs."""

from __future__ import annotations

import itertools
import math
import random
import shutil
import statistics
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import pytest
import torch

from opo_megatron.algorithm.experience_replay import (
    highest,
    of_most_variance,
    power_of_two_up_to,
    ramp,
    repo_advantages,
    spear_advantages,
)
from opo_megatron.algorithm.objectives.clipped import Clipped
from opo_megatron.batch.replay_buffer import (
    added,
    choose_at_random,
    choose_per_prompt,
    newest_per_prompt,
    without_older,
)
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import load_config
from opo_megatron.config.choices import ReplayChoice
from opo_megatron.config.rollout import ReplayConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.lift import LiftTask
from tests.support.tiny_run import easy_reward, lasting, rows, train

ON = "algorithm.off_policy_sampling=true"
REPO = (ON, "rollout.replay.method=repo", "rollout.replay.per_prompt=4", "rollout.replay.size=6",
        "rollout.replay.min_size=4")  # fmt: skip
SPEAR = (ON, "rollout.replay.method=spear", "rollout.replay.size=8", "rollout.replay.ramp_steps=3")
SEEDS = range(6)


# ---------------------------------------------------------------------- formulas


@pytest.mark.parametrize("seed", SEEDS)
def test_repo_normalizes_replayed_responses_of_a_prompt_among_themselves(seed: int) -> None:
    rng = random.Random(seed)
    groups = [[rng.choice([0.0, 1.0, rng.random()]) for _ in range(2 + seed)] for _ in range(5)]
    found = repo_advantages(torch.tensor(groups, dtype=torch.float64)).tolist()
    for group, advantages in zip(groups, found, strict=True):
        mean, deviation = statistics.fmean(group), statistics.stdev(group)
        expected = [(reward - mean) / (deviation + 1e-4) for reward in group]
        assert advantages == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_spear_measures_advantages_anew_against_the_median_group(seed: int, divides: bool) -> None:
    rng = random.Random(seed)
    history = [[rng.random() for _ in range(8)] for _ in range(10 + seed)]
    rewards = [rng.random() for _ in range(20)]
    means = [statistics.fmean(group) for group in history]
    deviations = [statistics.pstdev(group) for group in history]
    baseline = statistics.median(means)
    divisor = statistics.median(deviations) + 1e-6 if divides else 1.0
    found = spear_advantages(
        torch.tensor(rewards, dtype=torch.float64), means, deviations if divides else None
    )
    assert found.tolist() == pytest.approx([(reward - baseline) / divisor for reward in rewards], abs=1e-12)


@pytest.mark.parametrize(
    ("step", "steps", "factor"),
    [
        (1, 0, 1.0),
        (0, 200, 0.0),
        (50, 200, (1 - math.sqrt(0.5)) / 2),
        (100, 200, 0.5),
        (200, 200, 1.0),
        (900, 200, 1.0),
    ],
)
def test_the_factor_rises_along_a_cosine(step: int, steps: int, factor: float) -> None:
    assert ramp(step, steps) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("coefficient", [0.01, 0.25, 0.5, 1.0, 2.0])
def test_the_replayed_loss_is_the_clipped_one_times_its_coefficient(coefficient: float) -> None:
    generator = torch.Generator().manual_seed(1)
    log_prob, sampler = -torch.rand(2, 300, dtype=torch.float64, generator=generator) * 2
    advantages = torch.randn(300, dtype=torch.float64, generator=generator)
    log_prob.requires_grad_()
    ratio = (log_prob - sampler).exp()
    token = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    (expected,) = torch.autograd.grad(coefficient * token.sum() / 300, log_prob)
    columns = {"advantages": advantages, "old_log_prob": sampler}
    _, found = Clipped(300 / coefficient, 1.0, 0.2, 0.3)(log_prob.detach(), columns)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_the_subset_of_most_variance_is_that_of_an_enumeration(count: int) -> None:
    rng = random.Random(count)
    for _ in range(20):
        rewards = [rng.choice([0.0, 0.5, 1.0]) if count % 2 else rng.random() for _ in range(8)]
        found = [rewards[i] for i in of_most_variance(rewards, count)]
        scores = [
            (round(statistics.pvariance(subset), 12), sum(subset))
            for subset in itertools.combinations(rewards, count)
        ]
        assert len(found) == count
        assert (statistics.pvariance(found), sum(found)) == pytest.approx(max(scores), abs=1e-11)


@pytest.mark.parametrize(
    ("count", "power"), [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (1023, 512), (2048, 2048)]
)
def test_a_replay_has_a_power_of_two_samples(count: int, power: int) -> None:
    assert power_of_two_up_to(count) == power
    chosen = choose_at_random(range(100, 100 + count), 256, "1/7")
    assert len(chosen) == len(set(chosen)) == min(power, 256)
    assert chosen == choose_at_random(range(100, 100 + count), 256, "1/7")


def test_of_equal_rewards_the_oldest_are_the_highest() -> None:
    assert highest([0.0, 1.0, 0.5, 1.0, 1.0], 3) == [1, 3, 4]


# ---------------------------------------------------------------------- the buffer


def batch(prompts: list[int], rewards: list[float]) -> Rollouts:
    count = len(prompts)
    one = torch.ones(count, dtype=torch.int64)
    return Rollouts(
        prompt_ids=torch.tensor(prompts), groups=torch.arange(count), sample_indices=torch.arange(count),
        prompt_lengths=one, prompt_tokens=torch.arange(count), response_lengths=one,
        response_tokens=torch.arange(count), finish_reasons=0 * one,
        engine_log_prob=torch.zeros(count), rewards=torch.tensor(rewards, dtype=torch.float64),
        advantages=torch.zeros(count, dtype=torch.float64),
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_a_prompt_keeps_its_newest_responses(size: int) -> None:
    rng = random.Random(size)
    buffer, expected = None, defaultdict[int, deque[float]](lambda: deque(maxlen=size))
    for step in range(1, 9):
        prompts = [rng.randrange(3) for _ in range(4)]
        rewards = [rng.random() for _ in prompts]
        for prompt, reward in zip(prompts, rewards, strict=True):
            expected[prompt].append(reward)
        buffer = newest_per_prompt(added(buffer, batch(prompts, rewards), step), size)
    assert buffer is not None and buffer.rewards is not None and buffer.advantages is None
    for prompt, kept in expected.items():
        assert buffer.rewards[buffer.prompt_ids == prompt].tolist() == list(kept)


@pytest.mark.parametrize(("max_age", "oldest"), [(None, 1), (0, 9), (1, 8), (3, 6), (10, 1)])
def test_older_samples_are_dropped(max_age: int | None, oldest: int) -> None:
    buffer = None
    for step in range(1, 9):
        buffer = added(buffer, batch([step], [1.0]), step)
    assert buffer is not None
    kept = without_older(buffer, 9, max_age)
    assert kept.sampled_in is not None and kept.sampled_in.tolist() == list(range(oldest, 9))


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        (ReplayChoice.highest, [1, 4]),
        (ReplayChoice.recent, [4, 5]),
        (ReplayChoice.max_variance, [0, 1]),
        (ReplayChoice.random, None),
    ],
)
def test_a_prompt_that_comes_again_gets_the_responses_chosen(
    choice: ReplayChoice, chosen: list[int] | None
) -> None:
    buffer = added(None, batch([7, 7, 8, 7, 7, 7], [0.0, 1.0, 1.0, 0.4, 0.9, 0.2]), 1)
    replay = ReplayConfig(size=8, min_size=2, per_prompt=2, choose=choice)
    found = choose_per_prompt(buffer, [9, 7, 8], replay, "1/4")
    assert len(found) == 1, "prompt 9 is not kept, prompt 8 has a single response"
    assert found[0] == chosen if chosen is not None else set(found[0]) < {0, 1, 3, 4, 5}
    assert found == choose_per_prompt(buffer, [9, 7, 8], replay, "1/4")
    assert choose_per_prompt(buffer, [7], ReplayConfig(size=8, min_size=6, per_prompt=2), "1/4") == []


# ---------------------------------------------------------------------- settings


REFUSED = [
    (("rollout.replay.method=repo",), "rollout.replay.method is repo, which trains on responses of earlier"),
    (
        (ON, "rollout.replay.method=best"),
        "rollout.replay.method is 'best'; it must be one of off, repo, spear",
    ),
    ((*REPO, "rollout.staleness=2"), "rollout.replay.method=repo with rollout.staleness=2, whose rollouts"),
    (
        (*SPEAR, "algorithm.objective=clipped"),
        "method=spear with algorithm.objective=clipped, but the step's",
    ),
    (
        (*SPEAR, "rollout.overlap=true", "rollout.engine=sglang"),
        "method=spear with rollout.overlap=true, which",
    ),
    ((*REPO, "rollout.replay.min_size=3"), "rollout.replay.per_prompt is 4, but prompts are replayed from"),
    ((*REPO, "rollout.replay.min_size=9"), "rollout.replay.min_size is 9, but rollout.replay.size=6 keeps"),
    (
        (*REPO, "rollout.replay.divide_by_std=true"),
        "rollout.replay.divide_by_std is True, but rollout.replay.meth",
    ),
    (
        (*SPEAR, "rollout.replay.choose=recent"),
        "rollout.replay.choose is recent, but rollout.replay.method=spear",
    ),
    (
        ("rollout.replay.coefficient=2",),
        "rollout.replay.coefficient is 2.0, but rollout.replay.method=off does",
    ),
    ((*REPO, "rollout.replay.coefficient=0"), "rollout.replay.coefficient is 0.0; it must be above 0"),
    ((*REPO, "rollout.replay.per_prompt=1"), "rollout.replay.per_prompt is 1; it must be at least 2"),
    ((*SPEAR, "algorithm.loss_normalizer=constant"), "method=spear with algorithm.loss_normalizer=constant"),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED)
def test_settings_that_contradict_replay_are_refused_in_one_sentence(
    overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config(Path("recipes/quickstart.yaml"), ["run.dir=x", *overrides])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_defaults_are_those_of_the_published_recipes() -> None:
    def replay(*overrides: str) -> ReplayConfig:
        return load_config(Path("recipes/quickstart.yaml"), ["run.dir=x", ON, *overrides]).rollout.replay

    repo, spear = replay("rollout.replay.method=repo"), replay("rollout.replay.method=spear")
    assert (repo.size, repo.min_size, repo.per_prompt, repo.max_age, repo.ramp_steps) == (16, 16, 8, None, 0)
    assert (spear.size, spear.max_age, spear.ramp_steps, spear.history) == (2048, 10, 200, 10240)


# ---------------------------------------------------------------------- runs


SMALL = (
    "warm_start.steps=2", "train.steps=5", "eval.every_steps=0", "eval.problems=4", "eval.greedy=false",
    "optimizer.schedule=constant", "observe.tensorboard=false", "observe.kl=off", "task.options.floors=3",
    "task.options.moves=1", "checkpoint.every_steps=3",
)  # fmt: skip


@pytest.fixture
def rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiftTask, "reward", easy_reward)


@pytest.mark.slow
@pytest.mark.parametrize("method", [REPO, SPEAR], ids=["repo", "spear"])
def test_a_resumed_run_replays_the_same_responses(
    rewarded: None, tmp_path: Path, method: tuple[str, ...]
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert train(whole, *SMALL, *method) == 0
    metrics = rows(whole)[1:]
    replayed = [row for row in metrics if row["replay/samples"]]
    assert len(replayed) >= 2 and all(
        1 <= row["replay/age_mean"] <= row["replay/age_max"] for row in replayed
    )
    assert all(row["off_policy/k3"] > row["on_policy/k3"] for row in replayed)
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000005")
    assert train(run_dir, *SMALL, *method, "resume=auto") == 0
    for name in ("metrics.jsonl", "audit.jsonl"):
        assert lasting(run_dir, name) == lasting(whole, name)
    buffer = Path("checkpoints/step_00000005/replay_buffer.safetensors")
    assert (run_dir / buffer).read_bytes() == (whole / buffer).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", [REPO], ids=["repo"])
def test_a_replay_without_weight_is_plain_opo_bit_for_bit(
    rewarded: None, tmp_path: Path, method: tuple[str, ...]
) -> None:
    plain, replayed = tmp_path / "plain", tmp_path / "replayed"
    assert train(plain, *SMALL) == 0
    assert train(replayed, *SMALL, *method, "rollout.replay.coefficient=1e-30") == 0
    assert sum(row.get("replay/samples", 0) for row in rows(replayed)) > 0
    before, now = lasting(plain, "audit.jsonl"), lasting(replayed, "audit.jsonl")
    assert [row["weights"] for row in before] == [row["weights"] for row in now]


@pytest.mark.slow
def test_the_joint_gradient_is_the_sum_of_both(rewarded: None, tmp_path: Path) -> None:
    """At a vanishing learning rate the gradient norm of the step is that of its two losses together."""
    norms: dict[str, Any] = {}
    for coefficient in ("1e-30", "1", "2"):
        run_dir = tmp_path / coefficient
        options = ("optimizer.lr=1e-12", "optimizer.clip=0", f"rollout.replay.coefficient={coefficient}")
        assert train(run_dir, *SMALL, *REPO, *options) == 0
        norms[coefficient] = {row["step"]: row["grad_norm"] ** 2 for row in rows(run_dir)[1:]}
    # |g + c h|² is a parabola in c: c = 0, 1, 2 give |h|² > 0 as half the second difference.
    for row in rows(tmp_path / "1")[1:]:
        one, two, three = (norms[c][row["step"]] for c in ("1e-30", "1", "2"))
        second = (three - 2 * two + one) / 2
        assert (second > 1e-8) if row["replay/samples"] else abs(second) < 1e-6 * one
