"""Conversations on a real SGLang server: every turn agrees with the policy, over cached prefixes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opo_megatron.build import open_run
from opo_megatron.errors import EngineFailure
from opo_megatron.rollout.conversations import Limits
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.sglang.balance import Balance
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.run import Run
from tests.support.conversations import (
    LONGEST,
    STOPS,
    InProcess,
    InProcessEnvironments,
    Scripted,
    differences,
    environments_of,
    merged,
    requests_of,
    some_time,
)
from tests.support.fixtures import VOCAB_SIZE, small_config
from tests.support.servers import sglang_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLING = Sampling(max_tokens=48, stop_tokens=STOPS, seed=(3,), temperature=0.8)
COUNT = 24


@pytest.fixture(scope="module", params=["exact", "usual"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run_dir = tmp_path_factory.mktemp("conversations") / "run"
    config = small_config(
        f"run.dir={run_dir}",
        "policy.model.ffn_hidden_size=64",
        "rollout.engine=sglang",
        f"rollout.sglang.python={sglang_python()}",
        f"rollout.sglang.exact={str(request.param == 'exact').lower()}",
        *(["on_policy.tolerance=0"] if request.param == "exact" else []),
        "rollout.sglang.max_running_requests=32",
        "rollout.sglang.timeout_seconds=60",
        "warm_start.steps=0",
        "observe.kl=off",
        "observe.tensorboard=false",
    )
    with open_run(config) as run:
        run.generation.synchronize()
        yield run


def is_exact(run: Run) -> bool:
    return bool(run.config.rollout.sglang.exact)


def conversations_of(requests: list[GenerationRequest]) -> InProcess:
    return InProcess(requests, environments_of(len(requests)), Limits(4, 48, LONGEST), some_time)


def test_every_turn_agrees_with_the_policy_over_cached_prefixes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached: list[tuple[int, int]] = []
    post = Balance.post

    def recording(self: Balance, requests: Any, sampling: Sampling, **options: Any) -> list[Any]:
        replies = post(self, requests, sampling, **options)
        if options.get("sampled", [0])[0]:  # a later turn
            cached.append((replies[0]["meta_info"]["cached_tokens"], len(requests[0].tokens)))
        return replies

    monkeypatch.setattr(Balance, "post", recording)
    engine, requests = run.generation.engine, requests_of(COUNT)
    assert isinstance(engine, SglangEngine)
    rollouts = engine.generate(requests, SAMPLING, conversations=conversations_of(requests))
    by_turn = differences(run.policy, rollouts)
    assert len(by_turn) == 4 and min(map(len, by_turn)) > COUNT / 4
    assert sum(hits for hits, _ in cached) > 0.5 * sum(tokens for _, tokens in cached)
    worst = [max(turn) for turn in by_turn]
    assert worst == [0.0] * 4 if is_exact(run) else max(worst) < run.config.on_policy.tolerance
    assert rollouts.weight_versions is not None
    assert rollouts.weight_versions.unique().tolist() == [run.policy.version]


@pytest.mark.parametrize("run", ["exact"], indirect=True)
def test_in_exact_mode_the_local_engine_samples_the_same_conversations(run: Run) -> None:
    engine, requests = run.generation.engine, requests_of(COUNT)
    local = LocalEngine(run.config.policy.model, VOCAB_SIZE, torch.float32, torch.device("cpu"), 7, True)
    local.update_weights(run.policy.stream_weights(), run.policy.version)
    one, other = (
        each.generate(requests, SAMPLING, conversations=conversations_of(requests))
        for each in (engine, local)
    )
    assert merged(one) == merged(other)
    assert torch.equal(one.engine_log_prob, other.engine_log_prob)
    assert torch.equal(one.finish_reasons, other.finish_reasons)


def test_after_an_engine_failure_all_conversations_are_generated_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of their tokens is kept, whether they had ended or not."""
    opened: list[InProcess] = []
    post, turns = Balance.post, 0

    def failing(self: Balance, requests: Any, sampling: Sampling, **options: Any) -> list[Any]:
        nonlocal turns
        if "sampled" in options:  # not of a probe
            turns += 1
            if turns == COUNT + 5:
                raise EngineFailure("the connection was closed")
        return post(self, requests, sampling, **options)

    class Recording(InProcessEnvironments):
        def open(self, *arguments: Any) -> InProcess:
            opened.append(super().open(*arguments))
            return opened[-1]

    monkeypatch.setattr(Balance, "post", failing)
    requests = requests_of(COUNT)
    prompts = [run.task.prompt("train", i) for i in range(COUNT)]
    answers = environments_of(COUNT)
    environments = Recording(lambda prompt: Scripted(answers[prompts.index(prompt)].answers), 4, LONGEST)
    monkeypatch.setattr(run.generation, "environments", environments)
    rollouts = run.generation.generate(requests, SAMPLING, "test", prompts=prompts)
    assert len(opened) == 2 and all(conversations.is_closed for conversations in opened)
    assert run.generation.tokens_continued == 0
    assert rollouts.rewards is not None
    assert torch.equal(rollouts.rewards, opened[1].rewards())


def test_one_post_per_turn_and_no_barrier(run: Run) -> None:
    """A conversation whose environment never waits ends while another one's still thinks."""
    requests = requests_of(2)
    ended: list[int] = []

    class Watched(InProcess):
        def ready(self, timeout: float) -> Any:
            answers = super().ready(timeout)
            ended.extend(index for index, given in answers if given is None)
            return answers

    environments = [Scripted([[4], [5], [6]]), Scripted([[4]])]
    conversations = Watched(
        requests, environments, Limits(9, 48, LONGEST), lambda index, turn: 0 if index == 0 else 10**9
    )

    def until_first(done: int, total: int, tokens: int) -> None:
        if ended == [0]:
            conversations.waiting = [(0, answer) for _, answer in conversations.waiting]
            conversations.delay = lambda index, turn: 0

    run.generation.engine.generate(requests, SAMPLING, until_first, conversations=conversations)
    assert ended == [0, 1]
