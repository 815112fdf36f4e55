"""NaN and infinite rewards, losses and gradients: the batch is saved, the step skipped or the run stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.policy.policy import Policy
from opo_megatron.tasks.lift import LiftTask
from tests.support.tiny_run import easy_reward, lasting, rows, train

SMALL = ("warm_start.steps=2", "train.steps=4", "checkpoint.every_steps=1", "eval.greedy=false")
FAULT_STEP = 2
FAULT_VERSION = 2 + FAULT_STEP - 1
"""Version of the weights that sample it."""


@pytest.fixture
def nan_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """One reward of step 2 is NaN: that of the 30th response rewarded in training."""
    calls = 0

    def reward(self: LiftTask, prompt: object, response: list[int]) -> float:
        nonlocal calls
        calls += 1
        return float("nan") if calls == 16 + 24 + 6 else easy_reward(self, prompt, response)

    monkeypatch.setattr(LiftTask, "reward", reward)


@pytest.fixture
def infinite_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of step 2 has an infinite element."""
    monkeypatch.setattr(LiftTask, "reward", easy_reward)
    run_schedule = Policy._run
    faults = 0

    def run(self: Policy, *arguments: object, **options: object) -> None:
        nonlocal faults
        run_schedule(self, *arguments, **options)
        if self.version == FAULT_VERSION and not options.get("forward_only") and not faults:
            faults += 1
            self.ddp_chunks[0].buffers[0].grad_data[7] = float("inf")

    monkeypatch.setattr(Policy, "_run", run)


FAULTS = {"nan_reward": "is nan", "infinite_gradient": "the gradient is not finite"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_non_finite_step_is_skipped_and_its_batch_is_saved(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    request.getfixturevalue(fault)
    run_dir = tmp_path / "run"
    assert train(run_dir, *SMALL, "run.on_bad_numbers=skip") == 0
    metrics = rows(run_dir)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert [row.get("skipped") for row in metrics] == [None, None, 1, None, None]
    assert "reward/mean" not in metrics[2] and "eval/accuracy" in metrics[2], "step 2 is evaluated"
    dump = run_dir / "bad_batches" / f"step_{FAULT_STEP:08d}.safetensors"
    output = " ".join(capsys.readouterr().out.split())
    assert f"warning: step 2: the {'reward' if fault == 'nan_reward' else 'loss'}" in output
    assert FAULTS[fault] in output and f"its rollouts are in {dump}; the step is skipped" in output
    saved = Rollouts.load(dump)
    assert len(saved) == 24 and saved.rewards is not None
    assert int((~torch.isfinite(saved.rewards)).sum()) == (fault == "nan_reward")
    # The weights of step 2 also sample step 3: a skipped step does not update them.
    after = Rollouts.load(run_dir / "rollouts" / "step_00000003.safetensors")
    assert set(saved.weight_versions.tolist()) == set(after.weight_versions.tolist()) == {FAULT_VERSION}


def test_by_default_a_non_finite_value_stops_the_run(
    nan_reward: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, *SMALL) == 2
    error = capsys.readouterr().err
    dump = run_dir / "bad_batches" / f"step_{FAULT_STEP:08d}.safetensors"
    assert error.count("\n") == 1 and f"its rollouts are in {dump}; a verifier must" in error
    assert len(Rollouts.load(dump)) == 24
    assert [row["step"] for row in lasting(run_dir)] == [0, 1]


def test_a_non_finite_reward_in_an_evaluation_stops_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LiftTask, "reward", lambda self, prompt, response: float("inf"))
    assert train(tmp_path / "run", *SMALL, "run.on_bad_numbers=skip") == 2
    assert "in the evaluation the reward of prompt" in capsys.readouterr().err
