"""Conversations on the local engine: what is sampled, given, limited and recorded, at every turn."""

from __future__ import annotations

import pytest
import torch

from opo_megatron.batch.rollouts import (
    FINISH_ENVIRONMENT,
    FINISH_LENGTH,
    FINISH_TURNS,
    Rollouts,
)
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.errors import UserError
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.conversations import ConversationLedger, Limits
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.requests import compute_rewards
from opo_megatron.tasks.lift import LiftTask
from tests.support.conversations import (
    LONGEST,
    STOPS,
    Delay,
    InProcess,
    Scripted,
    at_once,
    differences,
    environments_of,
    merged,
    requests_of,
    some_time,
)
from tests.support.fixtures import VOCAB_SIZE
from tests.support.policies import make_exact, make_policy
from tests.support.policies import parallel as parallel


def engine_of(policy: Policy, slots: int, exact: bool = True) -> LocalEngine:
    engine = LocalEngine(
        policy.config.model, VOCAB_SIZE, torch.float32, torch.device("cpu"), slots, exact
    )  # fmt: skip
    engine.update_weights(policy.stream_weights(), policy.version)
    return engine


def converse(
    engine: LocalEngine, delay: Delay = at_once, turns: int = 4, max_tokens: int = 48, count: int = 12
) -> tuple[Rollouts, list[Scripted]]:
    requests, environments = requests_of(count), environments_of(count, turns)
    conversations = InProcess(requests, environments, Limits(turns, max_tokens, LONGEST), delay)
    sampling = Sampling(max_tokens=max_tokens, stop_tokens=STOPS, seed=(3,), temperature=0.8)
    return engine.generate(requests, sampling, conversations=conversations), environments


@pytest.mark.parametrize(("slots", "delay"), [(1, at_once), (5, some_time), (12, some_time)])
@pytest.mark.parametrize("exact", [True, False])
def test_every_turn_agrees_with_the_policy(parallel: Parallel, exact: bool, slots: int, delay: Delay) -> None:
    policy = make_exact(parallel)[1] if exact else make_policy(parallel)[0]
    rollouts, _ = converse(engine_of(policy, slots, exact), delay)
    by_turn = differences(policy, rollouts)
    assert len(by_turn) == 4 and all(len(turn) >= 3 for turn in by_turn)
    worst = [max(turn) for turn in by_turn]
    assert worst == [0.0] * 4 if exact else max(worst) <= 2e-5, worst


def test_samples_do_not_depend_on_slots_or_on_how_long_environments_think(parallel: Parallel) -> None:
    _, policy = make_exact(parallel)
    expected, _ = converse(engine_of(policy, 12))
    for slots, delay in ((2, some_time), (5, some_time), (12, some_time), (7, at_once)):
        rollouts, _ = converse(engine_of(policy, slots), delay)
        assert merged(rollouts) == merged(expected)
        assert torch.equal(rollouts.finish_reasons, expected.finish_reasons)
        assert torch.equal(rollouts.engine_log_prob, expected.engine_log_prob)


def test_environments_see_the_sampled_turns_and_samples_what_they_gave(parallel: Parallel) -> None:
    _, policy = make_exact(parallel)
    rollouts, environments = converse(engine_of(policy, 5), some_time)
    assert rollouts.given_lengths is not None and rollouts.given_tokens is not None
    given = rollouts.given_tokens.split(rollouts.given_lengths.tolist())
    for response, own, environment in zip(rollouts.responses(), given, environments, strict=True):
        assert response == environment.sampled
        shown = [token for answer in environment.answers[: environment.turns - 1] for token in answer]
        assert own.tolist() == shown
    assert rollouts.turns is not None
    assert rollouts.turns.tolist() == [environment.turns for environment in environments]
    rewards = [environment.reward() for environment in environments]
    assert rollouts.rewards is not None and rollouts.rewards.tolist() == rewards
    task = LiftTask()
    assert torch.equal(compute_rewards(task, [], rollouts), rollouts.rewards), "of the conversations"


def test_an_environment_that_ends_at_once_samples_what_single_turns_do(parallel: Parallel) -> None:
    _, policy = make_exact(parallel)
    engine = engine_of(policy, 5)
    sampling = Sampling(max_tokens=20, stop_tokens=STOPS, seed=(3,), temperature=0.8, energies=True)
    requests = requests_of()
    single = engine.generate(requests, sampling)
    conversations = InProcess(requests, [Scripted([]) for _ in requests], Limits(9, 20, LONGEST))
    both = engine.generate(requests, sampling, conversations=conversations)
    assert both.responses() == single.responses()
    assert torch.equal(both.engine_log_prob, single.engine_log_prob)
    assert torch.equal(both.energy, single.energy)
    assert both.given_lengths is not None and not both.given_lengths.any()


def test_no_requests_give_no_conversations(parallel: Parallel) -> None:
    _, policy = make_exact(parallel)
    rollouts, _ = converse(engine_of(policy, 5), count=0)
    assert len(rollouts) == 0 and rollouts.given_tokens is not None and rollouts.rewards is not None


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        pytest.param((9, 48, LONGEST), FINISH_ENVIRONMENT, id="none"),
        pytest.param((1, 48, LONGEST), FINISH_TURNS, id="one turn"),
        pytest.param((2, 48, LONGEST), FINISH_TURNS, id="two turns"),
        pytest.param((9, 5, LONGEST), FINISH_LENGTH, id="sampled tokens"),
        pytest.param((9, 1, LONGEST), FINISH_LENGTH, id="one token"),
        pytest.param((9, 8, 17), FINISH_LENGTH, id="sequence"),
    ],
)
def test_a_limit_ends_a_conversation_with_a_reason_of_its_own(
    parallel: Parallel, limits: tuple[int, int, int], expected: int
) -> None:
    _, policy = make_exact(parallel)
    requests, environments = requests_of(), environments_of()
    bounds = Limits(*limits)
    conversations = InProcess(requests, environments, bounds, some_time)
    sampling = Sampling(max_tokens=bounds.max_tokens, stop_tokens=STOPS, seed=(3,))
    rollouts = engine_of(policy, 5).generate(requests, sampling, conversations=conversations)
    reasons = rollouts.finish_reasons.tolist()
    assert expected in reasons and (bounds.max_turns < 4 or FINISH_TURNS not in reasons)
    assert rollouts.turns is not None
    assert int(rollouts.turns.max()) <= bounds.max_turns
    assert int(rollouts.response_lengths.max()) <= bounds.max_tokens
    assert int(rollouts.sequence_lengths.max()) <= bounds.max_sequence_length
    for sequence, reason, turns in zip(merged(rollouts), reasons, rollouts.turns.tolist(), strict=True):
        assert sequence[-1][1], "nothing is given behind the last sampled token"
        assert reason != FINISH_TURNS or turns == bounds.max_turns
        assert reason == FINISH_LENGTH or sequence[-1][0] in STOPS
    assert all(environment.turns for environment in environments), "each has seen its last turn"


@pytest.mark.parametrize(
    ("turns", "given", "reason"),
    [
        ([(3, False)], None, FINISH_ENVIRONMENT),
        ([(4, True)], None, FINISH_LENGTH),
        ([(4, True)], (7,), FINISH_LENGTH),
        ([(10, False)], (7,), FINISH_LENGTH),
        ([(2, False), (2, False)], (7,), FINISH_TURNS),
        ([(2, False)], (7,) * 14, FINISH_LENGTH),
    ],
)
def test_the_ledger_says_why_a_conversation_has_ended(
    turns: list[tuple[int, bool]], given: tuple[int, ...] | None, reason: int
) -> None:
    """Of at most 2 turns, 10 sampled tokens and a sequence of 20, with a prompt of 4."""
    ledger = ConversationLedger([GenerationRequest(0, 0, 0, (1, 2, 3, 4))], Limits(2, 10, 20))
    for i, (length, is_cut) in enumerate(turns):
        ledger.turn(0, [9] * length, FINISH_LENGTH if is_cut else 0)
        is_last = i == len(turns) - 1
        assert ledger.continues(0, given if is_last else (7,)) is not is_last
    with pytest.raises(RuntimeError, match="has not ended"):
        ledger.rewards()
    ledger.end(0, 0.5)
    assert ledger.rewards().tolist() == [0.5] and ledger.finish_reasons().tolist() == [reason]


def test_given_tokens_that_leave_room_for_one_more_are_accepted() -> None:
    ledger = ConversationLedger([GenerationRequest(0, 0, 0, (1, 2, 3, 4))], Limits(3, 10, 20))
    ledger.turn(0, [9, 9], 0)
    assert ledger.continues(0, (7,) * 13) and ledger.left(0) == 1


def test_an_environment_that_gives_no_tokens_is_refused() -> None:
    ledger = ConversationLedger([GenerationRequest(0, 0, 0, (1,))], Limits(3, 10, 20))
    ledger.turn(0, [9], 0)
    with pytest.raises(UserError, match=r"no tokens after a turn; return None from respond"):
        ledger.continues(0, ())
