"""Whole runs with other estimators than the paper's: energies, variance reports, `auto`, clipping."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import AlgorithmConfig, MismatchAction, OnPolicyConfig
from opo_megatron.algorithm.energy import EnergySums, sums_over
from opo_megatron.algorithm.fitted_weights import FEATURES
from opo_megatron.algorithm.objective import PolicyGradient, opo_objective
from opo_megatron.algorithm.token_baselines import token_advantages
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.distributed.megatron_versions import gradients_of_norm
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.policy.per_sample import TokenFactors, all_parameters, output_layer
from opo_megatron.policy.token_measures import measure_energies
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.tasks.lift import LiftTask
from tests.support.fixtures import (
    RECIPE,
    SMALL_MODEL,
    VOCAB_SIZE,
    ragged_rollouts,
    small_config,
    small_policy,
)
from tests.support.tiny_run import easy_reward

TINY = (
    *SMALL_MODEL,
    "warm_start.steps=6",
    "train.steps=3",
    "rollout.prompts_per_step=6",
    "rollout.samples_per_prompt=4",
    "eval.every_steps=0",
    "eval.problems=4",
    "eval.greedy=false",
    "observe.kl=off",
)


@pytest.fixture(autouse=True, scope="module")
def use_easy_reward() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        yield


def train(run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    assert main(["train", str(RECIPE), f"run.dir={run_dir}", *TINY, *overrides]) == 0
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def rollouts_of(run_dir: Path, step: int) -> Rollouts:
    return Rollouts.load(run_dir / "rollouts" / f"step_{step:08d}.safetensors")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_energies_of_the_engine_equal_those_of_a_forward_pass(temperature: float) -> None:
    config = small_config()
    parallel = initialize(config)
    policy = small_policy(config, parallel)
    engine = LocalEngine(config.policy.model, VOCAB_SIZE, torch.float32, parallel.device, slots=5)
    engine.update_weights(policy.stream_weights(), policy.version)
    requests = [GenerationRequest(i // 3, i // 3, i % 3, tuple(range(1, 2 + i // 3 % 7))) for i in range(24)]
    sampled = [
        engine.generate(requests, Sampling(12, (0,), (1,), temperature, energies=with_energies))
        for with_energies in (True, False)
    ]
    assert torch.equal(sampled[0].response_tokens, sampled[1].response_tokens) and sampled[1].energy is None
    schedule = policy.schedule(sampled[0].sequence_lengths)
    measured = measure_energies(policy, sampled[0].select(schedule.samples_of(0)), schedule, 24, temperature)
    shutdown()
    assert sampled[0].energy is not None and sampled[0].energy_hidden is not None
    torch.testing.assert_close(sampled[0].energy, measured.energy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sampled[0].energy_hidden, measured.energy_hidden, rtol=1e-5, atol=1e-6)
    assert float(measured.energy.std()) > 0.1


@pytest.mark.parametrize("weight", [pytest.param("energy", marks=pytest.mark.slow), "energy_hidden"])
def test_advantages_of_a_run_are_weighted_by_its_energies(tmp_path: Path, weight: str) -> None:
    train(tmp_path / "run", "algorithm.baseline=energy_loo", f"algorithm.weight={weight}")
    config = load_config(tmp_path / "run" / "config.yaml").algorithm
    rollouts = rollouts_of(tmp_path / "run", 2)
    assert rollouts.rewards is not None and rollouts.energy is not None
    assert rollouts.energy_hidden is not None and rollouts.advantages is not None
    lengths, sums = rollouts.response_lengths, EnergySums(rollouts.energy, rollouts.energy_hidden)
    expected = compute_advantages(config, rollouts.rewards, lengths, rollouts.groups, energies=sums)
    assert torch.equal(rollouts.advantages, expected)
    by_length = load_config(RECIPE, ["algorithm.baseline=opo_loo"]).algorithm
    assert not torch.equal(
        expected, compute_advantages(by_length, rollouts.rewards, lengths, rollouts.groups)
    )


@pytest.mark.parametrize("baseline", [pytest.param("otb", marks=pytest.mark.slow), "otb_loo"])
def test_a_run_has_an_advantage_for_each_token(
    tmp_path: Path, baseline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (f"algorithm.baseline={baseline}", "train.steps=2")
    rows = train(tmp_path / "run", *settings, "algorithm.variance_every=1", "algorithm.variance_prompts=4")
    assert "no backward pass is skipped" in " ".join(capsys.readouterr().out.split())
    config = load_config(tmp_path / "run" / "config.yaml").algorithm
    rollouts = rollouts_of(tmp_path / "run", 2)
    assert rollouts.rewards is not None and rollouts.advantages is not None
    assert rollouts.token_energy is not None and rollouts.token_advantages is not None
    lengths = rollouts.response_lengths
    expected = token_advantages(config, rollouts.rewards, lengths, rollouts.groups, rollouts.token_energy)
    assert torch.equal(rollouts.token_advantages, expected)
    assert torch.equal(rollouts.advantages, sums_over(expected, lengths) / lengths)
    assert len(expected[: int(lengths[0])].unique()) > 1
    for row in rows[1:]:
        assert row["variance/this_run"] == pytest.approx(row[f"variance/{baseline}"], rel=1e-5)
        assert {"variance/otb", "variance/otb_loo", "variance/james_stein"} <= row.keys()
    # With importance weights the policy's forward pass measures the energies; here they are 1.
    train(tmp_path / "corrected", *settings, "on_policy.action=correct")
    corrected = rollouts_of(tmp_path / "corrected", 1)
    assert corrected.token_energy is None and corrected.token_advantages is not None
    was = rollouts_of(tmp_path / "run", 1).token_advantages
    torch.testing.assert_close(corrected.token_advantages, was, rtol=1e-4, atol=1e-4)


def test_products_of_token_baselines_are_those_of_backward_passes(tmp_path: Path) -> None:
    """⟨ĝ_p, ĝ_q⟩ from energies and factors equal those of one backward pass per prompt; with a factor for
    each sample, they are the per-sample products."""
    config = small_config()
    parallel = initialize(config)
    policy = small_policy(config, parallel)
    rollouts = ragged_rollouts().select(range(8))
    rollouts.groups = torch.arange(8) // 4
    schedule = policy.schedule_replicated(rollouts.sequence_lengths, range(8))
    ordered = rollouts.select(schedule.samples_of(0))
    of_samples = torch.linspace(-1, 1, 8, dtype=torch.float64)
    seen: list[Any] = []

    def factors(energies: Any) -> Any:
        seen.append(energies)
        return torch.stack((torch.repeat_interleave(of_samples, ordered.response_lengths), energies))

    names = TokenFactors(("of samples", "of tokens"), factors)
    results = [of(policy, ordered, schedule, 0.7, names) for of in (output_layer, all_parameters)]
    mixing = torch.nn.functional.one_hot(ordered.groups).double().T * of_samples
    for result in results:
        expected = mixing @ result.gram @ mixing.T
        torch.testing.assert_close(result.token_products["of samples"], expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(result.token_products["of tokens"], expected, rtol=1e-2)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-6)
    weighted = replace(ordered, token_advantages=factors(seen[1])[1], advantages=of_samples)
    first = weighted.select((ordered.groups == 0).nonzero()[:, 0])
    one = policy.schedule_replicated(first.sequence_lengths, range(len(first)))
    policy.checked_gradients(first.select(one.samples_of(0)), one, PolicyGradient(-1.0, 0.7))
    policy.optimizer.prepare_grads()
    norm = sum(float(g.double().square().sum()) for g in gradients_of_norm(policy.optimizer))
    shutdown()
    assert float(results[1].token_products["of tokens"][0, 0]) == pytest.approx(norm, rel=1e-5)


def test_a_run_without_an_energy_baseline_stores_no_energies(tmp_path: Path) -> None:
    train(tmp_path / "run", "train.steps=1")
    assert rollouts_of(tmp_path / "run", 1).energy is None


@pytest.mark.slow
def test_variance_reports_are_periodic_and_change_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(tmp_path / "plain")
    for gradients in ("output_layer", "all_parameters"):
        capsys.readouterr()
        every = ("algorithm.variance_every=2", "algorithm.variance_prompts=4")
        rows = train(tmp_path / gradients, *every, f"algorithm.variance_of={gradients}")
        output = " ".join(capsys.readouterr().out.split())
        assert output.count("gradient's noise") == 2 and "rloo 1.00" in output
        assert [("variance/rloo" in row) for row in rows] == [False, True, False, True]
        for row in rows[1::2]:
            # Leaving its own reward out of the baseline scales an estimate by K/(K − 1).
            assert row["variance/group_mean"] == pytest.approx(0.75**2 * row["variance/rloo"], rel=1e-9)
            assert row["signal/group_mean"] == pytest.approx(0.75**2 * row["signal/rloo"], rel=1e-9)
            assert row["variance/this_run"] == row["variance/opo"] > 0
            assert -1 <= row["variance/correlation_energy"] <= 1
        for row, other in zip(rows, plain, strict=True):
            shared = {k: v for k, v in row.items() if k.partition("/")[0] not in
                      ("variance", "signal", "time", "memory", "throughput", "run")}  # fmt: skip
            assert shared == {k: other[k] for k in shared} and shared.keys() >= {"step"}


def test_auto_fits_every_report_and_applies_it_from_the_next_step(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", "algorithm.baseline=auto", "algorithm.variance_every=1")
    mixtures = [[row[f"baseline/auto_{name}"] for name in FEATURES] for row in rows[1:]]
    assert all(sum(mixture) == 1 for mixture in mixtures)
    # Before the first report the weights are the lengths.
    assert rows[1]["variance/auto"] == rows[1]["variance/opo_loo"]
    for row in rows[1:]:
        assert row["variance/this_run"] == pytest.approx(row["variance/auto"], rel=1e-9)
    single_feature = {(1.0, 0.0, 0.0): "rloo", (0.0, 1.0, 0.0): "opo_loo", (0.0, 0.0, 1.0): "energy_loo"}
    for before, row in zip(mixtures, rows[2:], strict=False):
        same_as = single_feature.get(tuple(before))
        assert same_as is None or row["variance/auto"] == pytest.approx(row[f"variance/{same_as}"])


def test_one_clipped_update_without_a_kl_is_the_policy_gradient(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    clipped = train(tmp_path / "clipped", "algorithm.objective=clipped")
    for row, other in zip(clipped[1:], plain[1:], strict=True):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert row["reward/mean"] == other["reward/mean"]
        assert row["on_policy/logprob_diff_max"] == pytest.approx(
            other["on_policy/logprob_diff_max"], abs=2e-6
        )


def test_several_clipped_updates_with_a_kl_take_as_many_optimizer_steps(tmp_path: Path) -> None:
    settings = ("algorithm.objective=clipped", "algorithm.updates_per_batch=3", "algorithm.baseline=grpo")
    rows = train(tmp_path / "run", *settings, "algorithm.kl_coefficient=0.5")
    for step in (1, 2, 3):
        # 6 warm-start steps, then 3 per batch; sampled before the first of the three.
        assert set(rollouts_of(tmp_path / "run", step).weight_versions.tolist()) == {6 + 3 * (step - 1)}
    without_kl = train(tmp_path / "without_kl", *settings)
    assert (
        without_kl[1]["grad_norm"] != rows[1]["grad_norm"] and (tmp_path / "run" / "start_weights").is_dir()
    )
    assert all(row["on_policy/logprob_diff_max"] < 2e-5 for row in rows[1:])


def test_the_importance_weight_cap_reaches_the_objective() -> None:
    settings = [
        OnPolicyConfig(action=action, max_importance_weight=1.5)
        for action in (MismatchAction.refuse, MismatchAction.correct)
    ]
    refuses, corrects = (opo_objective(AlgorithmConfig(), s, torch.tensor([3, 4]), 0.7) for s in settings)
    assert refuses.max_importance_weight is None and corrects.max_importance_weight == 1.5
    assert corrects.normalizer == 7 and corrects.temperature == 0.7
