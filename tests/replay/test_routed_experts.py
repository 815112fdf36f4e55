"""A run whose rollouts carry the engine's experts: its files, its metrics, its record and its replay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.cli.main import main
from opo_megatron.errors import EXIT_DIFFERS
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.local.decoder import Decoder
from opo_megatron.tasks.lift import LiftTask
from tests.support.tiny_run import easy_reward, rows, train

EXPERTS = (
    "warm_start.steps=1",
    "train.steps=2",
    "optimizer.min_lr_ratio=0.5",
    "eval.problems=4",
    "eval.greedy=false",
    "rollout.prompts_per_step=3",
    "checkpoint.every_steps=1",
    "eval.every_steps=2",
    "policy.model.num_layers=2",
    "policy.model.num_moe_experts=4",
    "policy.model.moe_ffn_hidden_size=24",
)
OTHER_LAYOUT = "policy.max_tokens_per_micro_batch=300"


def choose_the_worst(self: Decoder, scores: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """An engine that never takes the experts that the policy's routers would."""
    values, chosen = scores.topk(self.model.moe_router_topk, -1, largest=False)
    return values, chosen


@pytest.fixture(autouse=True)
def use_an_engine_with_other_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiftTask, "reward", easy_reward)
    monkeypatch.setattr(Decoder, "_choose", choose_the_worst)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        patch.setattr(Decoder, "_choose", choose_the_worst)
        folder = tmp_path_factory.mktemp("runs") / "experts"
        assert train(folder, *EXPERTS) == 0
        yield folder


def replay(folder: Path, *overrides: str) -> int:
    return main(["replay", str(folder), "--step", "2", *overrides])


def test_an_engine_that_takes_other_experts_is_on_policy_with_replay(run_dir: Path) -> None:
    """Probe, loss and the KL of the evaluation compare engine and policy at the engine's experts."""
    for row in rows(run_dir)[1:]:
        assert row["on_policy/logprob_diff_max"] <= 2e-5
        assert 1 / 4 <= row["experts/fullest_share"] <= 1 / 2
        assert 0 <= row["experts/dead"] < 1
    assert rows(run_dir)[0]["eval/kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_without_replay_such_an_engine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", *EXPERTS, "rollout.routing_replay=false") != 0
    assert "differs from the policy by" in capsys.readouterr().err


def test_rollout_files_and_the_record_have_the_experts(run_dir: Path) -> None:
    rollouts = Rollouts.load(run_dir / "rollouts/step_00000002.safetensors")
    assert rollouts.routed_experts is not None
    assert rollouts.routed_experts.shape == (int(rollouts.input_lengths.sum()), 2, 2)
    for row in rows(run_dir, "audit.jsonl"):
        digest = row["columns"].get("routed_experts")
        assert (digest is None) == (row["step"] == 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        pytest.param((), "every digest equals the record", id="generated"),
        pytest.param((OTHER_LAYOUT,), "all norms are within 1e-05", id="file", marks=pytest.mark.slow),
    ],
)
def test_a_step_with_experts_replays(
    run_dir: Path, overrides: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(run_dir, *overrides) == 0
    assert f"step 2: {words}" in capsys.readouterr().out


def test_an_expert_modified_in_the_rollouts_file_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    path = copy / "rollouts/step_00000002.safetensors"
    rollouts = Rollouts.load(path)
    assert rollouts.routed_experts is not None
    token = int(rollouts.input_lengths[0]) + 1  # the second of the second sample
    rollouts.routed_experts[token, 1] = 3 - rollouts.routed_experts[token, 1]
    rollouts.save(path)
    assert replay(copy) == EXIT_DIFFERS
    error = capsys.readouterr().err
    assert "differs from the record (routed_experts): token 1 of prompt" in error
    assert "of layer 2 and takes" in error


@pytest.mark.slow
def test_experts_of_a_pass_that_were_modified_change_the_weights(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step = Policy.train_step

    def modified(self: Policy, batch: Rollouts, *arguments: Any) -> Any:
        if batch.routed_experts is not None and self.version == 2:
            batch.routed_experts = 3 - batch.routed_experts
        return train_step(self, batch, *arguments)

    monkeypatch.setattr(Policy, "train_step", modified)
    assert replay(run_dir, "on_policy.action=warn") == EXIT_DIFFERS
    assert "the weight" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_without_the_column_has_no_load(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_choose", lambda self, scores, _: tuple(scores.topk(2, -1)))
        off = ("rollout.routing_replay=false", "train.steps=1", "eval.every_steps=0")
        assert train(tmp_path / "run", *EXPERTS, *off) == 0
    row = rows(tmp_path / "run")[-1]
    assert not any(name.startswith("experts/") for name in row)
    rollouts = Rollouts.load(tmp_path / "run/rollouts/step_00000001.safetensors")
    assert rollouts.routed_experts is None
    assert (
        "routed_experts"
        not in json.loads((tmp_path / "run/audit.jsonl").read_text().splitlines()[-1])["columns"]
    )
    assert torch.isfinite(torch.tensor(row["loss"]))
