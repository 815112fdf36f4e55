"""Environments in worker processes: a failure costs its own conversation, and nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock

import pytest

from opo_megatron.batch.rollouts import FINISH_ENVIRONMENT, FINISH_LENGTH, FINISH_STOP, FINISH_TURNS
from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.rollout.conversations import Answer, Conversations
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.environments import WorkerEnvironments
from opo_megatron.tasks.base import Prompt, Task
from opo_megatron.tasks.environment import make_environment, with_openings
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.tasks.stray_processes import MARK
from tests.support import environments
from tests.support.fixtures import small_config

SAMPLING = Sampling(max_tokens=12, stop_tokens=(0,), seed=(1,))
TURN = [3, 0]


def made(name: str, count: int = 8, max_turns: int = 4, **task: object) -> WorkerEnvironments:
    settings = {"environment_seconds": 20.0, "environment_memory_mib": 1500, "verifier_default": -0.5} | task
    config = small_config()
    config.task = TaskConfig(environment=f"tests.support.environments:{name}", **settings)  # type: ignore[arg-type]
    config.rollout.environments, config.rollout.max_turns = count, max_turns
    config.policy.model.max_sequence_length = 64
    lines: list[str] = []
    found = WorkerEnvironments(config, LiftTask(), lines.append)
    found.lines = lines  # type: ignore[attr-defined]
    return found


def opened(source: WorkerEnvironments, texts: Sequence[str], length: int = 2) -> Conversations:
    prompts = [Prompt(i, text, (5,) * length, "x") for i, text in enumerate(texts)]
    requests = [GenerationRequest(i, i, 0, prompt.tokens) for i, prompt in enumerate(prompts)]
    return source.open(requests, prompts, SAMPLING)


def converse(source: WorkerEnvironments, *texts: str, length: int = 2) -> list[tuple[float, int, int]]:
    """(reward, finish reason, turns) of conversations in which every turn is TURN."""
    conversations = opened(source, texts, length)
    turns = [1] * len(texts)
    for index in range(len(texts)):
        conversations.respond(index, TURN, FINISH_STOP)
    left, until = len(texts), time.monotonic() + 30
    while left:
        assert time.monotonic() < until
        for index, given in conversations.ready(0.5):
            if given is None:
                left -= 1
            else:
                turns[index] += 1
                conversations.respond(index, TURN, FINISH_STOP)
    rewards, reasons = conversations.rewards().tolist(), conversations.finish_reasons().tolist()
    conversations.close()
    return list(zip(rewards, reasons, turns, strict=True))


def processes_of(source: WorkerEnvironments) -> list[int]:
    entry = f"{MARK}={source.pool._mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def obedient() -> Iterator[WorkerEnvironments]:
    source = made("Obedient")
    yield source
    source.close()
    assert processes_of(source) == []


GOOD = (4.0, FINISH_ENVIRONMENT, 2)
FAILED = (-0.5, FINISH_ENVIRONMENT, 2)


@pytest.mark.parametrize(
    "what",
    [
        "raise",
        "exit",
        "die",
        "segfault",
        "kill parent",
        "hang",
        "memory",
        "child",
        "write",
        "raise in reward",
    ],
)
def test_a_failure_has_its_declared_outcome_and_costs_no_other(
    obedient: WorkerEnvironments, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    failures, others = obedient.failures, ["good"]
    if what in ("hang", "child"):
        others = []
        monkeypatch.setattr(obedient.config.task, "environment_seconds", 1.0)
    assert converse(obedient, *others, what, *others) == [
        *[GOOD] * len(others),
        FAILED,
        *[GOOD] * len(others),
    ]
    assert obedient.failures == failures + 1
    assert len(obedient.pool._processes) == 0


@pytest.mark.parametrize("what", ["fork", "print", "good", "sleep 0.2", "anything"])
def test_what_an_environment_does_beside_its_answer_changes_nothing(
    obedient: WorkerEnvironments, what: str
) -> None:
    failures = obedient.failures
    assert converse(obedient, what, "good") == [GOOD, GOOD]
    assert obedient.failures == failures


@pytest.mark.parametrize(
    ("what", "length", "expected"),
    [
        ("endless", 2, (8.0, FINISH_TURNS, 4)),
        ("endless", 58, (4.0, FINISH_LENGTH, 2)),
        ("good", 58, GOOD),
        ("task's reward", 2, (0.0, FINISH_ENVIRONMENT, 2)),
        ("sleep 0", 2, GOOD),
    ],
)
def test_a_conversation_ends_by_its_limits_and_still_has_a_reward(
    obedient: WorkerEnvironments, what: str, length: int, expected: tuple[float, int, int]
) -> None:
    assert converse(obedient, what, length=length) == [expected]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("wrong tokens", "respond returned [99]; it must return token ids from 0 to 16"),
        ("no tokens", "respond returned []; it must return token ids from 0 to 16, at least one"),
        ("nan", "reward returned nan; it must be a finite number"),
        ("other start", "start returned other tokens than before for the same prompt"),
    ],
)
def test_a_mistake_of_the_environment_is_named(obedient: WorkerEnvironments, what: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        converse(obedient, what)
    assert words in str(error.value)
    for key in list(obedient.pool._processes):
        obedient.pool.forget(key)


def test_conversations_that_were_closed_leave_no_reply_and_no_process(obedient: WorkerEnvironments) -> None:
    conversations = opened(obedient, ["good", "good"])
    conversations.respond(0, TURN, FINISH_STOP)
    conversations.close()
    assert obedient.pool._processes == {} and converse(obedient, "good") == [GOOD]


def test_more_conversations_than_processes_all_end(
    obedient: WorkerEnvironments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obedient.pool, "count", 2)
    results = converse(obedient, *["good", "raise", "endless"] * 4)
    assert results == [GOOD, FAILED, (8.0, FINISH_TURNS, 4)] * 4


def test_the_process_that_forks_is_started_again_where_it_was_killed(obedient: WorkerEnvironments) -> None:
    assert obedient.pool._parent is not None
    obedient.pool._parent.kill()
    obedient.pool._parent.wait()
    assert converse(obedient, *["raise"] * 9, "good") == [FAILED] * 9 + [GOOD]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.support.environments:Missing", "cannot be loaded: AttributeError"),
        ("no_such_module:Class", "cannot be loaded: ModuleNotFoundError"),
        ("tests.support.environments:NoReward", "has no reward; an environment needs start, respond, reward"),
        ("tests.support.environments:Raises", "cannot be made: KeyError ('option')"),
        ("tests.support.environments:SAMPLES", "cannot be loaded"),
    ],
)
def test_a_class_that_cannot_be_used_is_named(name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        make_environment(TaskConfig(environment=name))
    assert words in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("start", "tokens"),
    [
        ("prompt", (3, 4)), ("list", (3, 4)), ("longer", (1, 3, 4, 2)), ("shorter", (4,)),
        ("array", (3, 4, 5)),
    ],
)  # fmt: skip
def test_a_conversation_begins_with_what_start_returns(start: str, tokens: tuple[int, ...]) -> None:
    prompt = task_of(start).prompt("train", 0)
    assert prompt.tokens == tokens and prompt.unopened.tokens == (3, 4) and prompt.text == start
    assert task_of(start).vocab_size == 17


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ("none", "start returned None for prompt 7; it must return token ids from 0 to 16, at least one"),
        ("empty", "start returned [] for prompt 7"),
        ("unknown", "start returned [17] for prompt 7"),
        ("negative", "start returned [-1] for prompt 7"),
        ("text", "start returned 'ab' for prompt 7"),
        ("raises", "raised KeyError"),
    ],
)
def test_what_no_conversation_can_begin_with_is_named(start: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        task_of(start).prompt("train", 0)
    assert words in str(error.value) and environments.__name__ in str(error.value)


def task_of(start: str) -> Task:
    task = Mock(vocab_size=17)
    task.prompt.return_value = Prompt(7, start, (3, 4), "")
    return with_openings(task, TaskConfig(environment="tests.support.environments:Opens"))


def slowest(count: int, longest: float) -> float:
    return max(sum(environments.seconds(i, turn, longest) for turn in (1, 2, 3)) for i in range(count))


@pytest.mark.slow
def test_slow_environments_take_no_longer_than_the_slowest_alone(
    obedient: WorkerEnvironments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obedient.pool, "count", 64)
    converse(obedient, *["good"] * 32)
    started = time.monotonic()
    converse(obedient, *["slow 2.0"] * 32)
    assert time.monotonic() - started < 1.3 * slowest(32, 2.0)


def answers(conversations: Conversations) -> list[Answer]:
    return conversations.ready(5.0)


def test_an_answer_does_not_wait_for_slower_ones(obedient: WorkerEnvironments) -> None:
    conversations = opened(obedient, ["sleep 1000", "good"])
    for index in (0, 1):
        conversations.respond(index, TURN, FINISH_STOP)
    waiting = {0, 1}
    while waiting:
        for index, _ in answers(conversations):
            waiting.discard(index)
            conversations.respond(index, TURN, FINISH_STOP)
    assert answers(conversations) == [(1, None)]
    conversations.close()
