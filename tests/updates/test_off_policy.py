"""Updates of the objectives beside OPO's: PPO's loss, mini-batches, derived columns, and whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opo_megatron.algorithm.config import ObjectiveName
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.algorithm.objectives.build import build_objective
from opo_megatron.algorithm.objectives.clipped import Clipped
from opo_megatron.algorithm.objectives.table import SPECS
from opo_megatron.algorithm.objectives.tokens import Derives
from opo_megatron.batch.stats import gather_stats
from opo_megatron.config import load_config
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.errors import OnPolicyError
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.policy.policy import token_column
from opo_megatron.run import Run
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.updates.derived_columns import derived_columns
from opo_megatron.updates.off_policy import split_prompts
from tests.support import tiny_run
from tests.support.fixtures import ragged_rollouts, small_config, small_policy

N = 400


def columns() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    policy, old, reference = -torch.rand(3, N, dtype=torch.float64, generator=generator) * 2
    advantages = torch.randn(N, dtype=torch.float64, generator=generator)
    advantages[::7] = 0
    return policy, {"old_log_prob": old, "reference_log_prob": reference, "advantages": advantages}


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_are_those_of_the_definition(beta: float) -> None:
    policy, batch = columns()
    policy.requires_grad_()
    ratio = (policy - batch["old_log_prob"]).exp()
    advantages, delta = batch["advantages"], batch["reference_log_prob"] - policy
    objective = torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    expected = (-objective + beta * (delta.exp() - 1 - delta)) / 7.0
    (gradient,) = torch.autograd.grad(expected.sum(), policy)
    loss, coefficient = Clipped(7.0, 1.0, 0.2, 0.3, beta)(policy.detach(), batch)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(coefficient, gradient)
    clipped = ((ratio > 1.3) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert int(clipped.sum()) > 50 and (beta > 0 or not coefficient[clipped].any())


def test_at_the_sampling_policy_it_is_the_policy_gradient() -> None:
    policy, batch = columns()
    batch["old_log_prob"] = policy
    _, clipped = Clipped(7.0, 1.0, 0.2, 0.2)(policy, batch)
    _, plain = PolicyGradient(7.0, 1.0)(policy, batch)
    assert torch.equal(clipped, plain)


def test_reference_log_probs_are_required_only_with_a_kl() -> None:
    assert "reference_log_prob" not in Clipped(1.0, 1.0, 0.2, 0.2).columns
    assert "reference_log_prob" in Clipped(1.0, 1.0, 0.2, 0.2, 0.1).columns


def test_mini_batches_are_whole_prompts_and_a_function_of_the_seed() -> None:
    groups = torch.tensor([2, 2, 0, 0, 1, 1, 3, 3])
    parts = split_prompts(groups, 2, "1/5")
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert all(len(part) == 4 and len(set(groups[part].tolist())) == 2 for part in parts)
    assert parts == split_prompts(groups, 2, "1/5")
    assert len({str(split_prompts(groups, 2, f"1/{step}")) for step in range(20)}) > 1
    assert split_prompts(groups, 1, "1/5") == [list(range(8))]


OBJECTIVES = [name for name in ObjectiveName if name is not ObjectiveName.policy_gradient]


@pytest.mark.parametrize("name", [name.value for name in ObjectiveName if SPECS[name].derived])
def test_derived_columns_are_those_of_the_mini_batch_in_any_order(name: str) -> None:
    """The tokens of a schedule, which is not in the order of the samples, and of a part of the prompts."""
    config = small_config(f"algorithm.objective={name}", "algorithm.updates_per_batch=2")
    parallel = initialize(config)
    policy = small_policy(config, parallel)
    rollouts = ragged_rollouts()
    generator = torch.Generator().manual_seed(3)
    rollouts.advantages = torch.randn(len(rollouts), generator=generator, dtype=torch.float64)
    drift = torch.randn(3, int(rollouts.response_lengths.sum()), generator=generator)
    rollouts.engine_log_prob, rollouts.old_log_prob, rollouts.current_log_prob = drift / 4 - 2
    stats = gather_stats(parallel, rollouts)
    samples = split_prompts(stats.groups, 2, "0")[0]
    schedule = policy.schedule(stats.sequence_lengths, only=samples)
    assert schedule.samples_of(0) != samples
    objective, spec = build_objective(config.algorithm, 1.0, 1.0), SPECS[ObjectiveName(name)]
    assert isinstance(objective, Derives)
    part, ordered = rollouts.select(schedule.samples_of(0)), rollouts.select(samples)
    arguments = (schedule, stats, samples)
    found = derived_columns(parallel, spec, objective, part, *arguments)
    straight = replace(schedule, assignment=[[samples]])
    expected = derived_columns(parallel, spec, objective, ordered, straight, stats, samples)
    part.derived, ordered.derived = found, expected
    position = {sample: i for i, sample in enumerate(schedule.samples_of(0))}
    sorted_part = part.select([position[sample] for sample in samples])
    for column in spec.derived:
        assert torch.equal(token_column(sorted_part, column), token_column(ordered, column)), column
    shutdown()


# ---------------------------------------------------------------------- whole runs


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(LiftTask, "reward", tiny_run.easy_reward)
    yield


def run(folder: Path, *settings: str) -> list[dict[str, float]]:
    rows = ("train.steps=2", "eval.every_steps=0", "eval.problems=4", "checkpoint.every_steps=0")
    assert tiny_run.train(folder, *rows, "eval.greedy=false", "observe.kl=off", *settings) == 0
    return tiny_run.rows(folder)[1:]


def options_of(name: ObjectiveName) -> tuple[str, ...]:
    beta = ("algorithm.objective_options.beta=0.1",) if name is ObjectiveName.dro else ()
    return (f"algorithm.objective={name.value}", *beta)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_update_of_every_ratio_objective_is_the_policy_gradients(tmp_path: Path, easy: None) -> None:
    """Up to the engine's rounding: the first update's samples are on-policy."""
    plain = run(tmp_path / "plain")
    for name in OBJECTIVES:
        rows = run(tmp_path / name.value, *options_of(name))
        assert rows[0]["on_policy/logprob_diff_max"] < 1e-4
        same = rows[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-3)
        assert same == (name not in (ObjectiveName.oapl, ObjectiveName.brrl)), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_objective_takes_several_updates_and_saves_its_options(tmp_path: Path, easy: None) -> None:
    norms = set()
    for name in OBJECTIVES:
        rows = run(
            tmp_path / name.value, *options_of(name), "algorithm.updates_per_batch=3", "optimizer.lr=3e-3"
        )
        assert all(row["grad_norm"] > 0 for row in rows)
        norms.add(rows[1]["grad_norm"])
        saved = load_config(tmp_path / name.value / "config.yaml").algorithm.objective_options
        assert list(saved) == list(SPECS[name].options)
    assert len(norms) > len(OBJECTIVES) // 2  # off-policy, they differ


@pytest.mark.parametrize(
    "objective", ["dppo_tv", *(pytest.param(name, marks=pytest.mark.slow) for name in ("oapl", "bapo"))]
)
def test_every_objective_is_checked_before_its_first_update(
    tmp_path: Path, easy: None, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """Also where no pass measures old log-probabilities: all tokens of the first update are compared."""
    checked = []

    def refuse(self: Run, metrics: StepMetrics) -> None:
        checked.append(metrics)
        raise OnPolicyError("not this policy's")

    monkeypatch.setattr(Run, "check_on_policy", refuse)
    settings = (f"algorithm.objective={objective}", *tiny_run.ONE_STEP, "eval.every_steps=1")
    assert tiny_run.train(tmp_path, *settings) != 0
    assert len(checked) == 1 and checked[0].mismatch is not None
    assert [row["step"] for row in tiny_run.rows(tmp_path)] == [0]
