"""A task class of the user's own: the whole loop, and a sentence for each thing that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opo_megatron.cli.main import main
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks import make_task
from opo_megatron.tasks.base import PerResponseTask, Prompt
from tests.support.fixtures import RECIPE
from tests.support.paths import ROOT

COUNTING = "examples.counting_task:CountingTask"


class Fine(PerResponseTask):
    vocab_size = 4
    stop_tokens = (3,)
    notes: Any = ("two prompts",)

    def __init__(self, config: TaskConfig) -> None:
        self.options = config.options

    def size(self, split: str) -> int:
        return 2

    def prompt(self, split: str, index: int) -> Prompt:
        return Prompt(index, "p", (0, 1), "a")

    def reward(self, prompt: Prompt, response: list[int]) -> float:
        return 0.5

    def decode(self, tokens: list[int]) -> str:
        return "".join("abc."[token] for token in tokens)


def leave(*_: Any) -> Any:
    raise SystemExit(0)


def faulty(**attributes: Any) -> type:
    return type("Faulty", (Fine,), attributes)


MADE: dict[str, Any] = {
    "NotAClass": 3,
    "NoSize": type(
        "NoSize", (), {"__init__": lambda self, config: None, "vocab_size": 4, "stop_tokens": (3,)}
    ),
    "NoArgument": type("NoArgument", (Fine,), {"__init__": lambda self: None}),
    "Leaves": faulty(__init__=leave),
    "NoVocabulary": faulty(vocab_size=0),
    "FarStop": faulty(stop_tokens=(4,)),
    "NoStop": faulty(stop_tokens=()),
    "Empty": faulty(size=lambda self, split: 0),
    "TextPrompt": faulty(prompt=lambda self, split, index: "p"),
    "FarToken": faulty(prompt=lambda self, split, index: Prompt(0, "p", (9,), "a")),
    "Long": faulty(prompt=lambda self, split, index: Prompt(0, "p", (0,) * 600, "a")),
    "LeavesLater": faulty(prompt=leave),
    "LeavesInReward": faulty(reward=leave),
    "TextReward": faulty(reward=lambda self, prompt, response: "1"),
    "FewRewards": faulty(rewards=lambda self, prompts, responses: [1.0]),
    "NoRewards": faulty(rewards=lambda self, prompts, responses: None),
}
globals().update(MADE)


def use(name: str) -> None:
    task = make_task(TaskConfig(name=f"{__name__}:{name}", options={"one": 1}))
    task.start()
    task.size("train")
    prompt = task.prompt("train", 0)
    task.rewards([prompt] * 2, [[1, 3], [2]])
    task.close()


def test_a_class_needs_five_attributes_and_a_reward() -> None:
    use("Fine")
    task = make_task(TaskConfig(name=f"{__name__}:Fine", options={"one": 1}))
    assert task.rewards([task.prompt("train", 0)], [[1]]) == [0.5] and task.notes == ["two prompts"]
    with pytest.raises(UserError, match=r"has no demonstrations; set warm_start\.steps=0"):
        task.demonstration(task.prompt("train", 0), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Missing", "Missing cannot be made: AttributeError"),
        ("NotAClass", "NotAClass cannot be made: TypeError"),
        ("NoArgument", "NoArgument cannot be made: TypeError"),
        ("Leaves", r"Leaves cannot be made: SystemExit \(0\); it must be a class"),
        ("NoSize", "NoSize has no size, no prompt, no decode, no reward; a task class needs"),
        ("NoVocabulary", "vocab_size is 0; it must be a whole number, at least 1"),
        ("FarStop", r"stop_tokens is \(4,\); it must be token ids from 0 to 3"),
        ("NoStop", r"stop_tokens is \(\); it must be token ids, at least one"),
        ("Empty", r"size\('train'\) is 0; it must be a whole number, at least 1"),
        ("TextPrompt", r"prompt\('train', 0\) is 'p'; it must be a Prompt"),
        ("FarToken", r"prompt\('train', 0\).tokens is \(9,\); it must be token ids from 0 to 3"),
        ("Long", "is 600; it must be at most task.max_prompt_tokens=512"),
        ("LeavesLater", r"LeavesLater raised SystemExit \(0\) in prompt; correct it"),
        ("LeavesInReward", r"LeavesInReward raised SystemExit \(0\) in rewards; correct it"),
        ("TextReward", "a reward is wrong .*it must be a finite number"),
        ("FewRewards", "the number of rewards is 1; it must be that of the responses, 2"),
        ("NoRewards", "a reward is wrong"),
    ],
)
def test_what_is_wrong_with_a_class_is_one_sentence(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        use(name)
    assert "\n" not in str(error.value) and "task.name=" in str(error.value)


@pytest.fixture
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_example_learns_to_count(tmp_path: Path, in_checkout: None) -> None:
    tiny = "policy.model.hidden_size=32 policy.model.ffn_hidden_size=64 train.steps=2 warm_start.steps=30"
    tiny += " task.options.longest=2 task.max_prompt_tokens=8"
    recipe = [str(RECIPE), f"task.name={COUNTING}", f"run.dir={tmp_path / 'run'}", *tiny.split()]
    recipe += ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "eval.problems=16"]
    assert main(["train", *recipe]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["reward/mean"] > 0


def test_opo_data_shows_it(in_checkout: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["data", str(RECIPE), f"task.name={COUNTING}", "task.max_prompt_tokens=8", "--rows", "1"]) == 0
    )
    shown = capsys.readouterr().out
    assert "7:" not in shown and "0:" in shown and "1,2,3" in shown


def test_a_name_that_is_neither_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", str(RECIPE), "task.name=chess"]) == 2
    assert "must be one of lift, text, reasoning_gym, or package.module:Class" in capsys.readouterr().err
