"""Whole runs of a tiny recipe: their files, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.tasks.lift import LiftTask
from tests.support.fixtures import RECIPE
from tests.support.tiny_run import STEPS, easy_reward, lasting, rows, train


@pytest.fixture(autouse=True, scope="module")
def use_easy_reward() -> Iterator[None]:
    """A tiny policy never solves a lift problem: reward something that it does half of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(run_dir) == 0
    return run_dir


def test_metrics_hold_one_row_per_step_with_the_public_names(finished: Path) -> None:
    metrics = rows(finished)
    assert [row["step"] for row in metrics] == list(range(STEPS + 1))
    assert [row["step"] for row in rows(finished, "warm_start.jsonl")] == list(range(1, 7))
    assert "reward/mean" not in metrics[0], "no rollouts before step 1"
    for row in metrics[1:]:
        assert row["grad_norm"] > 0 and 0 < row["reward/mean"] < 1
        for name in (
            "reward/mean",
            "response_length/mean",
            "entropy",
            "grad_norm",
            "on_policy/logprob_diff_max",
            "on_policy/logprob_diff_mean",
            "on_policy/k3",
            "time/rollout",
            "time/train",
            "time/sync",
            "time/step",
        ):
            assert isinstance(row[name], float), name
        assert 0 <= row["on_policy/logprob_diff_mean"] <= row["on_policy/logprob_diff_max"] < 2e-5
    evaluated = [row["step"] for row in metrics if "eval/accuracy" in row]
    assert evaluated == [0, 2, 4] == [row["step"] for row in metrics if "eval/greedy_accuracy" in row]


def test_metrics_are_those_of_the_rollout_files(finished: Path) -> None:
    for row in rows(finished)[1:]:
        rollouts = Rollouts.load(finished / "rollouts" / f"step_{row['step']:08d}.safetensors")
        assert len(rollouts) == 24
        assert float(rollouts.rewards.mean()) == row["reward/mean"]
        lengths = rollouts.response_lengths.double()
        assert float(lengths.mean()) == row["response_length/mean"]
        # One optimizer step per batch: step k samples with the weights of warm start + k − 1 steps.
        assert set(rollouts.weight_versions.tolist()) == {6 + row["step"] - 1}
        # OPO's baseline: Σ l A = 0 in every group.
        sums = torch.zeros(6, dtype=torch.float64).scatter_add(
            0, rollouts.groups, lengths * rollouts.advantages
        )
        assert sums.abs().max() < 1e-12


def test_a_run_writes_checkpoints_config_and_summary(finished: Path) -> None:
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == [
        "step_00000002",
        "step_00000004",
        "warm_start_00000002",
        "warm_start_00000004",
        "warm_start_00000006",
    ]
    assert load_config(finished / "config.yaml").train.steps == STEPS
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["end"]["eval/accuracy"] == rows(finished)[-1]["eval/accuracy"]
    assert summary["start"]["eval/accuracy"] == rows(finished)[0]["eval/accuracy"]


def test_tensorboard_shows_the_metrics(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(finished / "tensorboard"))
    accumulator.Reload()
    values = {event.step: event.value for event in accumulator.Scalars("reward/mean")}
    assert values == pytest.approx({row["step"]: row["reward/mean"] for row in rows(finished)[1:]})


@pytest.mark.parametrize(
    "newest",
    [
        "step_00000002",
        pytest.param("warm_start_00000006", marks=pytest.mark.slow),
        "warm_start_00000004",
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    finished: Path, tmp_path: Path, newest: str | None
) -> None:
    """Interrupted after a checkpoint (or before the first), with later rows and a partial last line."""
    run_dir = tmp_path / "resumed"
    shutil.copytree(finished, run_dir)
    checkpoints = sorted(
        (run_dir / "checkpoints").iterdir(), key=lambda p: (p.name.startswith("step"), p.name)
    )
    position = [path.name for path in checkpoints].index(newest) + 1 if newest else 0
    for path in checkpoints[position:]:
        shutil.rmtree(path)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward/me')
    assert train(run_dir, "resume=auto") == 0
    for name in ("metrics.jsonl", "warm_start.jsonl"):
        assert lasting(run_dir, name) == lasting(finished, name), name
    attempts = [row["run/attempt"] for row in rows(run_dir)]
    assert attempts == ([1, 1, 1, 2, 2] if newest == "step_00000002" else [2] * 5)
    assert (run_dir / "attempts").read_text() == "2\n"
    for path in sorted((finished / "rollouts").iterdir()):
        assert path.read_bytes() == (run_dir / "rollouts" / path.name).read_bytes()


def test_a_finished_run_that_is_restarted_keeps_its_summary(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "again"
    shutil.copytree(finished, run_dir)
    summary = (run_dir / "summary.json").read_bytes()
    assert train(run_dir, "resume=auto") == 0
    assert f"nothing was left to do: {run_dir} has its {STEPS} OPO steps" in " ".join(
        capsys.readouterr().out.split()
    )
    assert (run_dir / "summary.json").read_bytes() == summary


def test_resume_auto_in_a_new_folder_starts_a_new_run(tmp_path: Path, finished: Path) -> None:
    assert train(tmp_path / "new", "resume=auto", "train.steps=1", "checkpoint.every_steps=0") == 0
    assert lasting(tmp_path / "new")[0] == lasting(finished)[0]


def test_resuming_from_an_older_checkpoint_abandons_newer_ones(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "back"
    shutil.copytree(finished, run_dir)
    older = run_dir / "checkpoints" / "step_00000002"
    constant = ("optimizer.schedule=constant", "--allow", "optimizer.schedule")
    assert train(run_dir, f"resume={older}", "train.steps=3", *constant) == 0
    names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert "step_00000004.abandoned-by-attempt-2" in names and "step_00000004" not in names
    assert train(run_dir, "resume=auto", "train.steps=5", *constant) == 0
    assert [(row["step"], row["run/attempt"]) for row in rows(run_dir)] == [
        (0, 1), (1, 1), (2, 1), (3, 2), (4, 3), (5, 3),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_new_run_from_the_checkpoint_of_another_has_its_rows(finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoints" / "step_00000002"
    assert train(tmp_path / "new", f"resume={checkpoint}") == 0
    assert lasting(tmp_path / "new") == lasting(finished)
    assert lasting(tmp_path / "new", "warm_start.jsonl") == lasting(finished, "warm_start.jsonl")


def test_non_finite_weights_stop_the_run_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "warm_start.steps=0", "optimizer.lr=1e36") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "finite" in error
    assert not (tmp_path / "run" / "checkpoints" / "step_00000004").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_learns_under_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    run_dir = tmp_path / "tp2"
    overrides = [f"run.dir={run_dir}", "--nproc", "2", "policy.tensor_model_parallel_size=2"]
    assert main(["train", str(RECIPE), *overrides]) == 0
    assert rows(run_dir)[-1]["eval/accuracy"] >= 0.90


EXACT = ("rollout.local.exact=true", "rollout.local.slots=5", "on_policy.tolerance=0")


def test_exact_mode_runs_with_tolerance_zero(tmp_path: Path) -> None:
    assert train(tmp_path / "run", *EXACT) == 0
    steps = rows(tmp_path / "run")
    assert len(steps) == 1 + STEPS
    assert all(row["on_policy/sync_diff_max"] == 0.0 for row in steps)
    assert all(row["on_policy/logprob_diff_max"] == 0.0 for row in steps[1:])


def test_a_machine_that_is_not_exact_stops_the_run_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opo_megatron.kernels.exact.QUERY_ROWS", 1)
    assert train(tmp_path / "run", *EXACT) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("error: rollout.local.exact=true, but with 1 slots engine and policy differ")
