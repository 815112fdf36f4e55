"""KL to the reference weights: the metrics of a run, the stored weights, and errors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import opo_megatron.evaluation.evaluate as evaluation
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.config.choices import Kl
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.weights.random_init import random_weights
from tests.support import dense_reference
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
    "warm_start.steps=2",
    "train.steps=2",
    "rollout.prompts_per_step=6",
    "rollout.samples_per_prompt=4",
    "optimizer.lr=0.02",
    "eval.every_steps=1",
    "eval.problems=12",
    "eval.temperature=0.8",
    "checkpoint.every_steps=1",
)
TEMPERATURE = 0.8
KL_METRICS = ("eval/kl", "eval/kl_per_response")
UNSTABLE = ("time/", "memory/", "throughput/", "run/")


def train(run_dir: Path, *overrides: str) -> int:
    return main(["train", str(RECIPE), f"run.dir={run_dir}", *TINY, *overrides])


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def lasting(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(UNSTABLE)} for row in rows(run_dir)]


@pytest.fixture(autouse=True, scope="module")
def use_easy_reward() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        yield


Evaluations = list[tuple[Rollouts, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluations]:
    """A run, and the sampled responses and policy weights of each of its evaluations."""
    run_dir, evaluations = tmp_path_factory.mktemp("runs") / "measured", Evaluations()
    original = evaluation.kl_to_reference

    def record(generation, responses, stats, reference):  # type: ignore[no-untyped-def]
        weights = {n: t.clone() for bucket in generation.policy.stream_weights() for n, t in bucket}
        evaluations.append((responses, weights))
        return original(generation, responses, stats, reference)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "kl_to_reference", record)
        assert train(run_dir) == 0
    return run_dir, evaluations


def reference_weights(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "start_weights" / "model.safetensors")


def dense(config, weights: dict[str, Tensor], rollouts: Rollouts) -> list[Tensor]:  # type: ignore[no-untyped-def]
    float64_weights = {name: tensor.double() for name, tensor in weights.items()}
    return [
        dense_reference.log_probs(
            config.policy.model, float64_weights, s[:p].tolist(), s[p:].tolist(), TEMPERATURE
        )
        for s, p in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True)
    ]


def test_kl_equals_that_of_a_dense_model_with_both_sets_of_weights(
    measured: tuple[Path, Evaluations],
) -> None:
    run_dir, evaluations = measured
    config = load_config(run_dir / "config.yaml")
    assert config.observe.kl is Kl.eval
    reference, metrics = reference_weights(run_dir), rows(run_dir)
    assert len(evaluations) == len(metrics) == 3
    for row, (responses, weights) in zip(metrics, evaluations, strict=True):
        before, now = dense(config, reference, responses), dense(config, weights, responses)
        deltas = [a - b for a, b in zip(before, now, strict=True)]
        sums = [float((d.exp() - 1 - d).sum()) for d in deltas]
        tokens = sum(d.numel() for d in deltas)
        assert row["eval/kl"] == pytest.approx(sum(sums) / tokens, rel=1e-3, abs=1e-9)
        assert row["eval/kl_per_response"] == pytest.approx(sum(sums) / len(sums), rel=1e-3, abs=1e-8)
    assert 0 <= metrics[0]["eval/kl"] < 1e-10
    assert 1e-4 < metrics[1]["eval/kl"] != metrics[2]["eval/kl"]


def test_reference_weights_are_those_of_step_0_bit_for_bit(measured: tuple[Path, Evaluations]) -> None:
    run_dir, evaluations = measured
    reference = reference_weights(run_dir)
    assert reference.keys() == evaluations[0][1].keys()
    assert all(torch.equal(reference[name], tensor) for name, tensor in evaluations[0][1].items())
    assert not (run_dir / "start_weights.partial").exists()


def test_measuring_the_kl_changes_no_other_metric(measured: tuple[Path, Evaluations], tmp_path: Path) -> None:
    assert train(tmp_path / "off", "observe.kl=off") == 0
    assert not (tmp_path / "off" / "start_weights").exists()
    with_kl = lasting(measured[0])
    assert all(name in row for row in with_kl for name in KL_METRICS)
    assert [{k: v for k, v in row.items() if k not in KL_METRICS} for row in with_kl] == lasting(
        tmp_path / "off"
    )


def test_the_k3_estimator_has_the_expectation_of_the_kl() -> None:
    """Against the closed form, summed over a vocabulary; the direction is KL(π ‖ π_0)."""
    generator = torch.Generator().manual_seed(0)
    now, reference = (
        torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2)
    )
    exact = (now.exp() * (now - reference)).sum()
    expectation = (now.exp() * evaluation.k3(reference - now)).sum()
    assert float(expectation) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.slow
def test_resumed_runs_use_the_same_reference_weights(
    measured: tuple[Path, Evaluations], tmp_path: Path
) -> None:
    same, new = tmp_path / "same", tmp_path / "new"
    shutil.copytree(measured[0], same)
    shutil.rmtree(same / "checkpoints" / "step_00000002")
    assert train(same, "resume=auto") == 0
    assert lasting(same) == lasting(measured[0])
    assert train(new, f"resume={same / 'checkpoints' / 'step_00000001'}") == 0
    assert lasting(new) == lasting(measured[0])
    for path in (same / "start_weights").iterdir():
        assert (new / "start_weights" / path.name).read_bytes() == path.read_bytes()


def test_another_warm_start_gives_other_reference_weights(
    measured: tuple[Path, Evaluations], tmp_path: Path
) -> None:
    run_dir = tmp_path / "back"
    shutil.copytree(measured[0], run_dir)
    older = run_dir / "checkpoints" / "warm_start_00000001"
    changes = ("warm_start.lr=0.05", "--allow", "warm_start.lr", "train.steps=0")
    assert train(run_dir, f"resume={older}", *changes) == 0
    assert rows(run_dir)[0]["eval/kl"] < 1e-10
    before, now = reference_weights(measured[0]), reference_weights(run_dir)
    assert not all(torch.equal(before[name], now[name]) for name in before)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "it does not exist"),
        (truncate, "model.safetensors has"),
        (break_index, "model.safetensors.index.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"{}"), "not a readable safetensors file"),
    ],
    ids=["missing", "truncated", "index", "file", "no file of the format"],
)
def test_unusable_reference_weights_are_an_error_before_any_write(
    measured: tuple[Path, Evaluations],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage,
    message: str,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(measured[0], run_dir)
    damage(run_dir / "start_weights")
    kept = (run_dir / "metrics.jsonl").read_bytes()
    checkpoint = run_dir / "checkpoints" / "step_00000001"
    for arguments in ((run_dir, "resume=auto"), (tmp_path / "new", f"resume={checkpoint}")):
        assert train(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ")
        assert message in error and "download" not in error
        assert str(run_dir / "start_weights") in error and "observe.kl=off" in error
    assert not (tmp_path / "new").exists()
    assert (run_dir / "metrics.jsonl").read_bytes() == kept
    assert train(run_dir, "resume=auto", "observe.kl=off", "train.steps=3") == 0


@pytest.fixture
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_swapped_weights_are_restored_bit_for_bit_also_after_an_error(parallel: Parallel, dtype: str) -> None:
    config = small_config(f"policy.dtype={dtype}")
    policy_a, policy_b = small_policy(config, parallel), small_policy(config, parallel)
    source = random_weights(config.policy.model, VOCAB_SIZE, 99)
    before = [p.detach().clone() for p in policy_a.chunks[0].parameters()]

    def fail(name: str) -> Tensor:
        if name == "model.norm.weight":
            raise RuntimeError("half way")
        return source(name)

    with policy_a.swap_weights(source):
        named = dict(policy_a.chunks[0].named_parameters())
        loaded = named["embedding.word_embeddings.weight"]
        assert torch.equal(loaded, source("model.embed_tokens.weight").to(loaded.dtype))
    with pytest.raises(RuntimeError, match="half way"), policy_a.swap_weights(fail):
        pass
    with pytest.raises(KeyError), policy_a.swap_weights(source):
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, policy_a.chunks[0].parameters(), strict=True))
    # A step afterwards equals that of a policy whose weights were never swapped.
    for policy in (policy_a, policy_b):
        rollouts = ragged_rollouts()
        rollouts.advantages = torch.linspace(-1, 1, len(rollouts), dtype=torch.float64)
        schedule = policy.schedule(rollouts.sequence_lengths)
        policy.train_step(
            rollouts.select(schedule.samples_of(0)), schedule, PolicyGradient(10.0, 1.0), lr=1e-2
        )
    for a, b in zip(policy_a.chunks[0].parameters(), policy_b.chunks[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_the_kl_of_a_bf16_run_is_zero_at_its_start_up_to_rounding(tmp_path: Path) -> None:
    settings = ("policy.dtype=bf16", "on_policy.tolerance=0.1", "train.steps=1", "optimizer.lr=0.1")
    assert train(tmp_path / "bf16", *settings) == 0
    first, last = rows(tmp_path / "bf16")
    assert 0 <= first["eval/kl"] < 1e-3 < last["eval/kl"] and math.isfinite(last["eval/kl"])


def test_an_unquoted_off_disables_the_kl() -> None:
    assert load_config(RECIPE, ["observe.kl=off"]).observe.kl is Kl.off


def test_the_summary_table_has_the_kl_where_it_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("warm_start.steps=0", "train.steps=0")
    assert train(tmp_path / "a", *short) == 0
    assert "KL to the reference" in capsys.readouterr().out
    assert train(tmp_path / "b", *short, "observe.kl=off") == 0
    assert "KL to the reference" not in capsys.readouterr().out
