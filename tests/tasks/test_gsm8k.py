"""Real text through the whole loop: byte tokens, a random policy, metrics recomputed here."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from opo_megatron.batch.rollouts import FINISH_LENGTH, Rollouts
from opo_megatron.cli.main import main
from tests.support.fixtures import RECIPE
from tests.support.requirements import require

SMOKE = RECIPE.parent / "gsm8k_smoke.yaml"
STEPS = 3


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("OPO_TEST_DATA", "nowhere")) / "gsm8k"
    if not folder.is_dir():
        pytest.skip("OPO_TEST_DATA names no folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    return folder


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k") / "run"
    assert main(["train", str(SMOKE), f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def steps(run_dir: Path) -> Iterator[list[tuple[dict, Rollouts]]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    yield [
        (row, Rollouts.load(run_dir / "rollouts" / f"step_{row['step']:08d}.safetensors")) for row in rows[1:]
    ]


def test_every_metric_is_finite(run_dir: Path) -> None:
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            assert value is not None and math.isfinite(value), name


def test_metrics_equal_a_count_by_hand(steps: list[tuple[dict, Rollouts]]) -> None:
    for row, rollouts in steps:
        responses = rollouts.responses()
        lengths = [len(response) for response in responses]
        assert row["response_length/mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert row["response_length/max"] == max(lengths)
        assert row["tokens/response"] == sum(lengths)
        truncated = [response[-1] != 256 for response in responses]
        assert row["response_length/truncated"] == sum(truncated) / len(truncated)
        assert truncated == [reason == FINISH_LENGTH for reason in rollouts.finish_reasons.tolist()]
        rewards = rollouts.rewards.tolist()
        assert row["reward/mean"] == sum(rewards) / len(rewards)
        groups = [rewards[i : i + 4] for i in range(0, len(rewards), 4)]
        assert row["groups/without_signal"] == sum(len(set(group)) == 1 for group in groups) / len(groups)
        advantages = rollouts.advantages.tolist()
        assert row["advantage/mean"] == pytest.approx(sum(advantages) / len(advantages), abs=1e-12)


def test_prompts_are_those_of_the_file_and_vary_in_length(
    steps: list[tuple[dict, Rollouts]], data: Path
) -> None:
    questions = {
        json.loads(line)["question"] + "\nAnswer: " for line in (data / "train.jsonl").open(encoding="utf-8")
    }
    lengths = []
    for _, rollouts in steps:
        for prompt in rollouts.prompt_tokens.split(rollouts.prompt_lengths.tolist()):
            assert bytes(prompt.tolist()).decode() in questions
            lengths.append(len(prompt))
    assert max(lengths) <= 400 and max(lengths) > 2 * min(lengths)


def test_rewards_compare_the_last_numbers(steps: list[tuple[dict, Rollouts]], data: Path) -> None:
    answers = {}
    for line in (data / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        answers[row["question"] + "\nAnswer: "] = float(row["answer"].split("####")[1].replace(",", ""))
    for _, rollouts in steps:
        prompts = rollouts.prompt_tokens.split(rollouts.prompt_lengths.tolist())
        for prompt, response, reward in zip(prompts, rollouts.responses(), rollouts.rewards, strict=True):
            text = bytes(t for t in response if t < 256).decode(errors="replace")
            numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+", text)
            gold = answers[bytes(prompt.tolist()).decode()]
            assert float(reward) == float(bool(numbers) and float(numbers[-1].replace(",", "")) == gold)


def test_reasoning_gym_runs_through_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("reasoning_gym", "make setup-dev")
    folder = tmp_path / "run"
    overrides = ["task.name=reasoning_gym", "task.generator=chain_sum", "task.generator_size=100"]
    overrides += ["task.verifier_pattern=(-?[0-9]+)", "train.steps=2", "eval.problems=8"]
    monkeypatch.setenv("OPO_TEST_DATA", "unused")
    assert main(["train", str(SMOKE), f"run.dir={folder}", *overrides]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:]:
        rollouts = Rollouts.load(folder / "rollouts" / f"step_{row['step']:08d}.safetensors")
        assert row["reward/mean"] == float(rollouts.rewards.mean()) and 0 <= row["reward/mean"] <= 1
        assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
