"""The lift's tool: it tells the floor after a stretch, and its price is paid in reward."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.rollout.environments import with_answers
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.lift import STOP, LiftTask
from opo_megatron.tasks.lift_tool import LiftTool
from tests.support.fixtures import small_config
from tests.support.tiny_run import lasting, rows, train

RIDE = Prompt(0, "5+3+3-4+1=", (), "6")  # 8, 9, 5, 6
encode = LiftTask.encode


@pytest.mark.parametrize(
    ("stretch", "turns", "given", "reward"),
    [
        (32, ["?$", "#6$"], ["6,", None], 0.9),
        (2, ["?$", "?$", "#6$"], ["9,", "6,", None], 0.8),
        (2, ["?$", "?$", "?$", "#6$"], ["9,", "6,", "6,", None], 0.7),
        (1, ["?$", "#6$"], ["8,", None], 0.9),
        (32, ["#6$"], [None], 1.0),
        (32, ["#5$"], [None], 0.0),
        (32, ["?$", "#5$"], ["6,", None], 0.0),
        (32, ["??$"], [None], 0.0),
        (32, ["?"], [None], 0.0),
    ],
)
def test_questions_are_answered_and_paid_for(
    stretch: int, turns: list[str], given: list[str | None], reward: float
) -> None:
    tool = LiftTool(TaskConfig(environment_options={"stretch": stretch, "cost": 0.1}))
    tool.start(RIDE)
    answers = [tool.respond(encode(turn)) for turn in turns]
    assert [None if one is None else LiftTask.decode(list(one)) for one in answers] == given
    assert tool.reward() == pytest.approx(reward)


@pytest.mark.parametrize(
    "options", [{"price": 1}, {"stretch": 0}, {"stretch": 1.5}, {"cost": 2}, {"cost": True}]
)
def test_wrong_options_of_the_tool_are_named(options: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"task.environment_options.{next(iter(options))} is"):
        LiftTool(TaskConfig(environment_options=options))


def test_half_of_the_rides_are_short_where_the_option_says_so() -> None:
    plain, mixed = LiftTask({"moves": 10}), LiftTask({"moves": 10, "easy_moves": 2, "asks": 40})
    texts = [mixed.prompt("train", i).text for i in range(400)]
    short = [len(text) == 6 for text in texts]
    assert 140 < sum(short) < 260 and {len(text) for text in texts} == {6, 22}
    assert all(len(plain.prompt("train", i).text) == 22 for i in range(50))
    asks = [
        mixed.demonstration(mixed.prompt("train", i), random.Random(i))[:2] == encode("?$")
        for i in range(400)
    ]
    assert 110 < sum(asks) < 210
    held_out = {mixed.prompt("held_out", i).text for i in range(400)}
    assert not held_out & set(texts)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("#6$", "#6$"), ("?$#6$", "?$6,#6$"), ("?$?$#6$", "?$6,?$6,#6$"), ("?$", "?$"),
        ("#6$?$#6$", "#6$?$#6$"),
    ],
)  # fmt: skip
def test_demonstrations_have_the_answers_between_their_turns(response: str, expected: str) -> None:
    config = small_config()
    config.task = TaskConfig(environment="lift_tool")
    prompt = Prompt(0, RIDE.text, tuple(encode(RIDE.text)), "6")
    rollouts = Rollouts.from_demonstrations([prompt.tokens] * 2, [encode("#1$"), encode(response)])
    played = with_answers(config, (STOP,), [prompt] * 2, rollouts)
    sequences = [LiftTask.decode(one.tolist()) for one in played.sequences()]
    assert sequences == [RIDE.text + "#1$", RIDE.text + expected]
    assert played.response_lengths.tolist() == [3, len(response)]


def test_a_run_of_own_environments_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Their processes answer in any order, in which `exact` computes the same; `start` adds a token."""
    overrides = (
        "task.environment=tests.support.environments:AsksBehindASign", "task.options.asks=50",
        "task.options.easy_moves=1", "policy.model.num_layers=2", "warm_start.steps=40", "warm_start.lr=4e-3",
        "rollout.prompts_per_step=4", "train.steps=2", "eval.every_steps=0", "eval.problems=4",
        "observe.tensorboard=false", "rollout.local.exact=true", "on_policy.tolerance=0",
        "checkpoint.every_steps=0", "rollout.environments=2", "task.options.floors=17",
    )  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train(whole, *overrides) == 0
    last = rows(whole)[-1]
    assert last["conversation/turns_mean"] > 1.1 and last["grad_norm"] > 0
    prompts = Rollouts.load(whole / "rollouts" / "step_00000002.safetensors")
    for prompt in prompts.prompt_tokens.split(prompts.prompt_lengths.tolist()):
        sign, floor, *_ = LiftTask.decode(prompt.tolist())
        assert sign == "?" and floor.isdigit()
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_00000002")
    assert train(resumed, *overrides, "resume=auto") == 0
    for name in ("metrics.jsonl", "audit.jsonl"):
        assert lasting(resumed, name) == lasting(whole, name)
