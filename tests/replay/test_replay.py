"""`opo replay`: an honest step is equal, and what is not as it was is named."""

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
from tests.support.tiny_run import train

SMALL = (
    "warm_start.steps=2",
    "train.steps=4",
    "checkpoint.every_steps=2",
    "eval.greedy=false",
    "policy.model.num_layers=2",
)
STEP = 4
"""Behind the checkpoint of step 2, by way of step 3."""


def easy(self: LiftTask, prompt: Any, response: list[int]) -> float:
    return float(sum(response) % 2)


@pytest.fixture(autouse=True)
def some_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny policy never answers a lift's question: reward something that it does half of the time."""
    monkeypatch.setattr(LiftTask, "reward", easy)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiftTask, "reward", easy)
        run_dir = tmp_path_factory.mktemp("runs") / "honest"
        assert train(run_dir, *SMALL) == 0
        yield run_dir


def replay(run_dir: Path, *overrides: str, step: int = STEP) -> int:
    return main(["replay", str(run_dir), "--step", str(step), *overrides])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [STEP, 1])
def test_an_honest_step_is_equal_and_the_run_stays_as_it_is(
    honest: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    before = contents(honest)
    assert replay(honest, step=step) == 0
    said = capsys.readouterr().out
    assert f"step {step}: every digest equals the record (rollouts generated again)" in said
    assert contents(honest) == before and not (honest / "replays").exists()


def test_another_layout_is_compared_by_norms(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(honest, "policy.max_tokens_per_micro_batch=300") == 0
    said = capsys.readouterr().out
    assert f"step {STEP}: all norms are within 1e-05 of the record (rollouts read from file" in said


def test_layouts_that_round_otherwise_have_other_names() -> None:
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
def test_two_ranks_replay_what_one_did(honest: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    from subprocess import run as run_process
    from sys import executable

    interrupted = WORKERS / "interrupted_run.py"
    launch = "from opo_megatron.distributed.launch import run_ranks; import sys; "
    launch += "sys.exit(run_ranks(sys.argv[1:], 2))"
    command = [executable, str(interrupted), "[null]", "replay", str(honest), "--step", str(STEP)]
    command += layout
    done = run_process([executable, "-c", launch, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "all norms are within 1e-05" in done.stdout


def differs(capsys: pytest.CaptureFixture[str], run_dir: Path, *overrides: str) -> str:
    """The one line that says what is not as it was."""
    assert replay(run_dir, *overrides) == EXIT_DIFFERS
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("column", "place", "words"),
    [
        ("rewards", 9, "(rewards): the reward of prompt {prompt}, sample 1 was {was} and is {now}"),
        ("response_tokens", 0, "(response_tokens): token 0 of the response of prompt {prompt}, sample 0 was"),
    ],
)
def test_a_value_that_was_changed_in_the_rollouts_file_is_named(
    honest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, place: int, words: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(honest, run_dir)
    path = run_dir / "rollouts" / f"step_{STEP:08d}.safetensors"
    rollouts = Rollouts.load(path)
    values = getattr(rollouts, column).clone()
    was = values[place].item()
    values[place] = values[place] + 1
    replace(rollouts, **{column: values}).save(path)
    prompt = int(rollouts.prompt_ids[place])
    error = differs(capsys, run_dir)
    assert f"step {STEP}: {path} differs from the record" in error
    assert words.format(prompt=prompt, was=was + 1, now=was) in error


def test_a_reward_that_was_another_while_the_run_went_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def reward(self: LiftTask, prompt: Any, response: list[int]) -> float:
        nonlocal calls
        calls += 1
        # Evaluations of 16 at steps 0 and 2; then the third response of step 4.
        return easy(self, prompt, response) + (calls == 16 + 24 + 24 + 16 + 24 + 3)

    with monkeypatch.context() as patch:
        patch.setattr(LiftTask, "reward", reward)
        assert train(tmp_path / "run", *SMALL) == 0
    capsys.readouterr()
    error = differs(capsys, tmp_path / "run")
    rollouts = Rollouts.load(tmp_path / "run" / "rollouts" / f"step_{STEP:08d}.safetensors")
    now = float(rollouts.rewards[2]) - 1
    assert f"the reward of prompt {int(rollouts.prompt_ids[2])}, sample 2 was {now + 1} and is {now}" in error


def test_a_token_that_was_another_while_the_run_went_is_named(
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
    assert "token 0 of the response of prompt" in differs(capsys, tmp_path / "run")


@pytest.mark.parametrize("overrides", [(), ("policy.max_tokens_per_micro_batch=300",)], ids=["same", "other"])
def test_a_weight_that_was_changed_while_the_run_went_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
) -> None:
    """One bit in the same layout; more than rounding in another."""
    train_step = Policy.train_step

    def tampered(self: Policy, *arguments: Any) -> Any:
        result = train_step(self, *arguments)
        if self.version == 2 + STEP:
            weight = self.chunks[0].get_parameter("decoder.layers.1.self_attention.linear_qkv.weight")
            with torch.no_grad():
                if overrides:
                    weight[-1] *= 1.01  # the last row is one of the last group's value
                else:
                    weight.view(torch.int32)[-1, 3] ^= 1
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "train_step", tampered)
        assert train(tmp_path / "run", *SMALL) == 0
    capsys.readouterr()
    error = differs(capsys, tmp_path / "run", *overrides)
    assert f"step {STEP}: the weight model.layers.1.self_attn.v_proj.weight " in error


def test_a_batch_with_a_bad_reward_is_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A verifier that is bad for one response is bad again; one that was bad once is not."""

    def reward(self: LiftTask, prompt: Any, response: list[int]) -> float:
        is_bad = prompt.id == bad_prompt and response == bad_response
        return float("nan") if is_bad else easy(self, prompt, response)

    assert train(tmp_path / "first", *SMALL) == 0
    rollouts = Rollouts.load(tmp_path / "first" / "rollouts" / f"step_{STEP:08d}.safetensors")
    bad_prompt, bad_response = int(rollouts.prompt_ids[5]), rollouts.responses()[5]
    with monkeypatch.context() as patch:
        patch.setattr(LiftTask, "reward", reward)
        assert train(tmp_path / "run", *SMALL, "run.on_bad_numbers=skip") == 0
        capsys.readouterr()
        assert replay(tmp_path / "run") == 0
        said = capsys.readouterr().out
        assert f"step {STEP} is non-finite again: the reward of prompt {bad_prompt} is nan" in said
    error = differs(capsys, tmp_path / "run")
    assert "was non-finite in the run and is finite in the replay" in error
    assert f"prompt {bad_prompt}, sample {int(rollouts.sample_indices[5])} had the reward nan" in error


def test_a_step_that_is_not_there_is_a_mistake(honest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(honest, step=9) == 2
    assert "has the steps 1 to 4" in capsys.readouterr().err
    assert main(["replay", str(honest / "rollouts"), "--step", "1"]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err


def test_the_chain_tells_where_two_runs_part(honest: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "other", *SMALL, "optimizer.lr=2.9e-4") == 0
    rows = [
        [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
        for folder in (honest, tmp_path / "other")
    ]
    same = [a["chain"] == b["chain"] for a, b in zip(*rows, strict=True)]
    assert same == [True, False, False, False, False]
    assert rows[0][1]["columns"] == rows[1][1]["columns"], "step 1 was drawn from the same weights"
    assert rows[0][1]["weights"] != rows[1][1]["weights"]
