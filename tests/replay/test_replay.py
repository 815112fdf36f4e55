"""`opo replay`: an unmodified step matches its record, and a modified value is reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opo_megatron.audit.record import layout_of
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.cli.main import main
from opo_megatron.errors import EXIT_DIFFERS
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.tasks.lift import LiftTask
from tests.support.fixtures import small_config
from tests.support.paths import WORKERS
from tests.support.tiny_run import easy_reward, train

SMALL = (
    "warm_start.steps=2",
    "train.steps=4",
    "checkpoint.every_steps=2",
    "eval.greedy=false",
    "policy.model.num_layers=2",
)
STEP = 4
"""After the checkpoint of step 2; step 3 is replayed on the way."""


@pytest.fixture(autouse=True)
def use_easy_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny policy never solves a lift problem: reward something that it does half of the time."""
    monkeypatch.setattr(LiftTask, "reward", easy_reward)


@pytest.fixture(scope="module")
def unmodified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy_reward)
        run_dir = tmp_path_factory.mktemp("runs") / "unmodified"
        assert train(run_dir, *SMALL) == 0
        yield run_dir


def replay(run_dir: Path, *overrides: str, step: int = STEP) -> int:
    return main(["replay", str(run_dir), "--step", str(step), *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [STEP, 1])
def test_an_unmodified_step_matches_and_the_run_is_unchanged(
    unmodified: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    before = contents(unmodified)
    assert replay(unmodified, step=step) == 0
    output = capsys.readouterr().out
    assert f"step {step}: every digest equals the record (rollouts generated again)" in output
    assert contents(unmodified) == before and not (unmodified / "replays").exists()


def test_a_replay_under_another_layout_compares_norms(
    unmodified: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replay(unmodified, "policy.max_tokens_per_micro_batch=300") == 0
    output = capsys.readouterr().out
    assert f"step {STEP}: all norms are within 1e-05 of the record (rollouts read from file" in output


def test_layouts_with_different_rounding_have_different_names() -> None:
    parallel: Any = SimpleNamespace(world_size=4, device=torch.device("cpu"))
    packed = "policy.packing=thd"
    names = {
        layout_of(small_config(*overrides, world_size=4), parallel)
        for overrides in (
            (),
            (packed,),
            (packed, "policy.context_parallel_size=2"),
            (packed, "policy.context_parallel_size=4"),
            ("policy.tensor_model_parallel_size=2",),
            ("policy.pipeline_model_parallel_size=2",),
        )
    }
    assert len(names) == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "layout",
    [
        ("policy.tensor_model_parallel_size=2",),
        ("policy.packing=thd", "policy.context_parallel_size=2"),
    ],
    ids=["tensor", "context"],
)
def test_two_ranks_replay_a_step_of_one(unmodified: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    from subprocess import run as run_process
    from sys import executable

    interrupted = WORKERS / "interrupted_run.py"
    launch = "from opo_megatron.distributed.launch import run_ranks; import sys; "
    launch += "sys.exit(run_ranks(sys.argv[1:], 2))"
    command = [executable, str(interrupted), "[null]", "replay", str(unmodified), "--step", str(STEP)]
    command += layout
    completed = run_process([executable, "-c", launch, *command], capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert "all norms are within 1e-05" in completed.stdout


def difference_message(capsys: pytest.CaptureFixture[str], run_dir: Path, *overrides: str) -> str:
    """The one line that names what differs from the record."""
    assert replay(run_dir, *overrides) == EXIT_DIFFERS
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("column", "index", "message"),
    [
        ("rewards", 9, "(rewards): the reward of prompt {prompt}, sample 1 was {recorded} and is {replayed}"),
        ("response_tokens", 0, "(response_tokens): token 0 of the response of prompt {prompt}, sample 0 was"),
    ],
)
def test_a_value_modified_in_the_rollouts_file_is_named(
    unmodified: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    column: str,
    index: int,
    message: str,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unmodified, run_dir)
    path = run_dir / "rollouts" / f"step_{STEP:08d}.safetensors"
    rollouts = Rollouts.load(path)
    values = getattr(rollouts, column).clone()
    recorded = values[index].item()
    values[index] = values[index] + 1
    replace(rollouts, **{column: values}).save(path)
    prompt = int(rollouts.prompt_ids[index])
    error = difference_message(capsys, run_dir)
    assert f"step {STEP}: {path} differs from the record" in error
    assert message.format(prompt=prompt, recorded=recorded + 1, replayed=recorded) in error


def test_a_reward_modified_during_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def reward(self: LiftTask, prompt: Any, response: list[int]) -> float:
        nonlocal calls
        calls += 1
        # Evaluations of 16 at steps 0 and 2; then the third response of step 4.
        return easy_reward(self, prompt, response) + (calls == 16 + 24 + 24 + 16 + 24 + 3)

    with monkeypatch.context() as patch:
        patch.setattr(LiftTask, "reward", reward)
        assert train(tmp_path / "run", *SMALL) == 0
    capsys.readouterr()
    error = difference_message(capsys, tmp_path / "run")
    rollouts = Rollouts.load(tmp_path / "run" / "rollouts" / f"step_{STEP:08d}.safetensors")
    replayed = float(rollouts.rewards[2]) - 1
    assert (
        f"the reward of prompt {int(rollouts.prompt_ids[2])}, sample 2 was {replayed + 1} and is {replayed}"
        in error
    )


def test_a_token_modified_during_the_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = LocalEngine.generate

    def tampered(self: LocalEngine, requests: Any, sampling: Any, *rest: Any) -> Rollouts:
        rollouts = generate(self, requests, sampling, *rest)
        if sampling.seed[1:] == (0, STEP):
            rollouts.response_tokens[0] = (rollouts.response_tokens[0] + 1) % 10
        return rollouts

    with monkeypatch.context() as patch:
        patch.setattr(LocalEngine, "generate", tampered)
        assert train(tmp_path / "run", *SMALL, "on_policy.action=warn") == 0
    capsys.readouterr()
    assert "token 0 of the response of prompt" in difference_message(capsys, tmp_path / "run")


@pytest.mark.parametrize("overrides", [(), ("policy.max_tokens_per_micro_batch=300",)], ids=["same", "other"])
def test_a_weight_modified_during_the_run_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
) -> None:
    """One bit under the same layout; more than rounding under another."""
    train_step = Policy.train_step

    def tampered(self: Policy, *arguments: Any) -> Any:
        result = train_step(self, *arguments)
        if self.version == 2 + STEP:
            weight = self.chunks[0].get_parameter("decoder.layers.1.self_attention.linear_qkv.weight")
            with torch.no_grad():
                if overrides:
                    weight[-1] *= 1.01  # the last row belongs to the value projection of the last group
                else:
                    weight.view(torch.int32)[-1, 3] ^= 1
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "train_step", tampered)
        assert train(tmp_path / "run", *SMALL) == 0
    capsys.readouterr()
    error = difference_message(capsys, tmp_path / "run", *overrides)
    assert f"step {STEP}: the weight model.layers.1.self_attn.v_proj.weight " in error


def test_a_batch_with_a_non_finite_reward_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verifier that always returns NaN for a response does so in the replay; a single NaN does not."""

    def reward(self: LiftTask, prompt: Any, response: list[int]) -> float:
        is_nan = prompt.id == nan_prompt and response == nan_response
        return float("nan") if is_nan else easy_reward(self, prompt, response)

    assert train(tmp_path / "first", *SMALL) == 0
    rollouts = Rollouts.load(tmp_path / "first" / "rollouts" / f"step_{STEP:08d}.safetensors")
    nan_prompt, nan_response = int(rollouts.prompt_ids[5]), rollouts.responses()[5]
    with monkeypatch.context() as patch:
        patch.setattr(LiftTask, "reward", reward)
        assert train(tmp_path / "run", *SMALL, "run.on_bad_numbers=skip") == 0
        capsys.readouterr()
        assert replay(tmp_path / "run") == 0
        output = capsys.readouterr().out
        assert f"step {STEP} is non-finite again: the reward of prompt {nan_prompt} is nan" in output
    error = difference_message(capsys, tmp_path / "run")
    assert "was non-finite in the run and is finite in the replay" in error
    assert f"prompt {nan_prompt}, sample {int(rollouts.sample_indices[5])} had the reward nan" in error


def test_a_missing_step_is_an_error(unmodified: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(unmodified, step=9) == 2
    assert "has the steps 1 to 4" in capsys.readouterr().err
    assert main(["replay", str(unmodified / "rollouts"), "--step", "1"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_the_audit_chain_shows_where_two_runs_diverge(unmodified: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "other", *SMALL, "optimizer.lr=2.9e-4") == 0
    rows = [
        [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
        for folder in (unmodified, tmp_path / "other")
    ]
    same = [a["chain"] == b["chain"] for a, b in zip(*rows, strict=True)]
    assert same == [True, False, False, False, False]
    assert rows[0][1]["columns"] == rows[1][1]["columns"], "step 1 was sampled from the same weights"
    assert rows[0][1]["weights"] != rows[1][1]["weights"]
