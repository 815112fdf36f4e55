"""A whole run of conversations: its files, killed and resumed, replayed, and in the report."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opo_megatron import build
from opo_megatron.batch.rollouts import FINISH_NAMES, Rollouts
from opo_megatron.cli.main import main
from opo_megatron.config import Config
from opo_megatron.evaluation import run_eval
from opo_megatron.tasks import Prompt
from tests.support.conversations import InProcessEnvironments, Scripted, merged
from tests.support.tiny_run import lasting, rows, train

SHORT = (
    "warm_start.steps=2", "warm_start.batch_size=8", "train.steps=2", "checkpoint.every_steps=1",
    "eval.every_steps=0", "eval.problems=4", "rollout.max_response_tokens=16", "observe.tensorboard=false",
    "policy.model.num_layers=2",
)  # fmt: skip
TURNS = 2


def environment_of(prompt: Prompt) -> Scripted:
    """Two turns: what is given between them depends on the prompt; digits are worth reward."""
    given = [prompt.tokens[0], *(2 + (prompt.id + i) % 15 for i in range(prompt.id % 4))]
    return Scripted([given], lambda tokens: sum(token >= 7 for token in tokens) / (1 + len(tokens)))


@pytest.fixture(autouse=True, scope="module")
def use_environments() -> Iterator[None]:
    def in_process(config: Config, *_: Any) -> InProcessEnvironments:
        return InProcessEnvironments(environment_of, TURNS, config.policy.model.max_sequence_length)

    with pytest.MonkeyPatch.context() as patch:
        for module in (build, run_eval):
            patch.setattr(module, "open_environments", in_process)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(run_dir, *SHORT) == 0
    return run_dir


def rollouts_of(run_dir: Path, step: int) -> Rollouts:
    return Rollouts.load(run_dir / "rollouts" / f"step_{step:08d}.safetensors")


def test_files_and_metrics_of_a_run_are_those_of_its_conversations(finished: Path) -> None:
    for row in rows(finished)[1:]:
        rollouts = rollouts_of(finished, row["step"])
        assert rollouts.turns is not None and rollouts.given_lengths is not None
        assert {*rollouts.turns.tolist()} == {1, 2}
        assert row["on_policy/logprob_diff_max"] < 2e-5 and row["grad_norm"] > 0
        assert row["tokens/response"] == int(rollouts.response_lengths.sum())
        assert row["tokens/processed"] == sum(map(len, merged(rollouts)))
        assert row["conversation/given_tokens"] == int(rollouts.given_lengths.sum())
        assert row["conversation/turns_mean"] == pytest.approx(float(rollouts.turns.double().mean()))
        ended = [row[f"conversation/ended_by_{name}"] for name in FINISH_NAMES.values()]
        assert sum(ended) == pytest.approx(1) and row["run/environment_failures"] == 0
        rewards = [sum(t >= 7 for t in one) / (1 + len(one)) for one in rollouts.responses()]
        assert rollouts.rewards is not None and rollouts.rewards.tolist() == pytest.approx(rewards)


@pytest.mark.parametrize("newest", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_run_of_conversations_resumes_bit_for_bit(
    finished: Path, tmp_path: Path, newest: int
) -> None:
    run_dir = tmp_path / "resumed"
    shutil.copytree(finished, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        if path.name.startswith("step") and int(path.name.split("_")[1]) > newest:
            shutil.rmtree(path)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/me')
    assert train(run_dir, *SHORT, "resume=auto") == 0
    for name in ("metrics.jsonl", "audit.jsonl"):
        assert lasting(run_dir, name) == lasting(finished, name), name
    assert [row["run/attempt"] for row in rows(run_dir)][-1] == 2
    for path in sorted((finished / "rollouts").iterdir()):
        assert path.read_bytes() == (run_dir / "rollouts" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("policy.max_tokens_per_micro_batch=100",)])
def test_a_step_of_conversations_is_replayed(
    finished: Path, layout: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Generated again in the run's layout, read from the file in another one, with recorded rewards."""
    assert main(["replay", str(finished), "--step", "2", *layout]) == 0
    verdict = "all norms are within" if layout else "every digest equals"
    assert verdict in capsys.readouterr().out


@pytest.mark.slow
def test_a_replay_names_the_given_token_that_differs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "changed"
    shutil.copytree(finished, run_dir)
    rollouts = rollouts_of(run_dir, 2)
    assert rollouts.given_tokens is not None
    rollouts.given_tokens[0] += 1
    rollouts.save(run_dir / "rollouts" / "step_00000002.safetensors")
    assert main(["replay", str(run_dir), "--step", "2"]) != 0
    assert re.search(r"given token 0 of prompt \d+, sample \d+ was \d+ and is \d+", capsys.readouterr().err)


def test_the_report_shows_what_was_sampled_and_what_was_given(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(finished), "--rollouts", "6", "--out", str(page)]) == 0
    found = re.search(r'<script[^>]* id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    for group in data["groups"]:
        rollouts = rollouts_of(finished, group["step"])
        members = rollouts.select((rollouts.groups == group["group"]).nonzero()[:, 0])
        members = members.select(members.sample_indices.argsort())
        for sample, sequence in zip(group["samples"], merged(members), strict=True):
            continuation = sequence[group["prompt_tokens"] :]
            assert sample["given"] == [int(not sampled) for _, sampled in continuation]
            assert [value is None for value in sample["log_probs"]] == [bool(g) for g in sample["given"]]
            assert sample["tokens"] + sample["given_tokens"] == len(continuation)
            assert sample["turns"] in (1, 2) and sample["ended_by"] in FINISH_NAMES.values()
            assert sample["truncated"] == (sample["ended_by"] in ("length", "turns"))


@pytest.mark.slow
def test_an_evaluation_writes_the_turns_of_its_samples(finished: Path) -> None:
    assert main(["eval", str(finished)]) == 0
    (path,) = (finished / "eval").rglob("samples_held_out.jsonl")
    samples = [one for line in path.read_text().splitlines() for one in json.loads(line)["samples"]]
    assert {len(one["turns"]) for one in samples} == {1, 3}
    for one in samples:
        assert [name for turn in one["turns"] for name in turn] == ["sampled", "given", "sampled"][
            : len(one["turns"])
        ]
        assert "".join(turn.get("sampled", "") for turn in one["turns"]) == one["text"]
