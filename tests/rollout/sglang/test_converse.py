"""What a conversation asks a server for at every turn, and what becomes of the replies."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from opo_megatron.errors import EngineFailure, Preempted
from opo_megatron.kernels.exact_sampling import uniforms
from opo_megatron.rollout.conversations import Limits
from opo_megatron.rollout.engine import GenerationRequest, Sampling, sampling_key
from opo_megatron.rollout.sglang.conversing import converse
from opo_megatron.rollout.sglang.replies import KEY, generate_body, rollouts_of
from tests.support.conversations import InProcess, Scripted, merged

STOP = 0
SAMPLING = Sampling(max_tokens=10, stop_tokens=(STOP,), seed=(1, 2))


class FakeBalance:
    """A server that samples turns of three tokens, of which the last one is the stop token."""

    def __init__(self, fails_at: int = -1) -> None:
        self.asked: list[tuple[GenerationRequest, int, int]] = []
        self.fails_at, self.lock = fails_at, threading.Lock()

    def post(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, sampled: Sequence[int]
    ) -> list[Any]:
        (request,) = requests
        with self.lock:
            self.asked.append((request, sampling.max_tokens, sampled[0]))
            if len(self.asked) == self.fails_at:
                raise EngineFailure("the connection was closed")
        ids = [5, 6, STOP][: sampling.max_tokens]
        reason = "stop" if ids[-1] == STOP else "length"
        meta_info = {
            "output_token_logprobs": [[-0.5 - sampled[0] - i, token, None] for i, token in enumerate(ids)],
            "weight_version": "4",
            "finish_reason": {"type": reason, "matched": ids[-1]},
        }
        return [{"output_ids": ids, "meta_info": meta_info}]


def conversations_of(
    answers: Sequence[Sequence[int]], count: int = 1, max_turns: int = 9
) -> tuple[list[GenerationRequest], InProcess]:
    requests = [GenerationRequest(7 + i, i, 0, (1, 2, 3)) for i in range(count)]
    environments = [Scripted(answers) for _ in requests]
    return requests, InProcess(requests, environments, Limits(max_turns, SAMPLING.max_tokens, 64))


@pytest.mark.parametrize(
    ("answers", "max_turns", "turns"),
    [
        ([], 9, [(3, 10, 0)]),
        ([[8]], 9, [(3, 10, 0), (7, 7, 3)]),
        ([[8, 8], [9]], 9, [(3, 10, 0), (8, 7, 3), (12, 4, 6)]),
        ([[8]] * 9, 2, [(3, 10, 0), (7, 7, 3)]),
        ([[8]] * 9, 9, [(3, 10, 0), (7, 7, 3), (11, 4, 6), (15, 1, 9)]),
    ],
)
def test_every_turn_asks_with_all_tokens_so_far_for_what_is_left(
    answers: list[list[int]], max_turns: int, turns: list[tuple[int, int, int]]
) -> None:
    """By turn: (tokens before it, tokens that it may have, sampled tokens before it)."""
    requests, conversations = conversations_of(answers, max_turns=max_turns)
    balance = FakeBalance()
    replies, given = converse(balance, requests, SAMPLING, conversations, None)  # type: ignore[arg-type]
    asked = [(len(request.tokens), left, sampled) for request, left, sampled in balance.asked]
    assert asked == turns
    rollouts = given.entered(rollouts_of(requests, replies, SAMPLING), conversations)
    (sequence,) = merged(rollouts)
    for request, _, _ in balance.asked:
        assert [token for token, _ in sequence][: len(request.tokens)] == list(request.tokens)
    assert rollouts.turns is not None and rollouts.turns.tolist() == [len(turns)]
    assert rollouts.weight_versions is not None and {*rollouts.weight_versions.tolist()} == {4}
    log_probs = [-0.5 - i for i in range(int(rollouts.response_lengths))]
    assert rollouts.engine_log_prob is not None and rollouts.engine_log_prob.tolist() == log_probs


@pytest.mark.parametrize(
    ("prompt", "given", "sampled"), [(3, 0, 0), (3, 4, 2), (1, 1, 1), (8, 30, 5), (2, 0, 9)]
)
def test_random_numbers_belong_to_the_count_of_sampled_tokens(prompt: int, given: int, sampled: int) -> None:
    """A server in exact mode counts positions from the start of the sequence."""
    request = GenerationRequest(7, 0, 1, (1,) * prompt)
    longer = GenerationRequest(7, 0, 1, (1,) * (prompt + given + sampled))
    body = generate_body([longer], SAMPLING, exact=True, sampled=[sampled])
    key = body["sampling_params"][0]["custom_params"][KEY]
    of_server = uniforms(torch.tensor([key]), torch.tensor([len(longer.tokens)]))
    of_local = uniforms(torch.tensor([sampling_key(SAMPLING, request)]), torch.tensor([sampled]))
    assert torch.equal(of_server, of_local)


def test_a_failure_of_any_turn_is_raised() -> None:
    for fails_at in (1, 3, 5, 8, 12):
        requests, conversations = conversations_of([[8], [9]], count=4)
        with pytest.raises(EngineFailure, match="was closed"):
            converse(FakeBalance(fails_at), requests, SAMPLING, conversations, None)  # type: ignore[arg-type]


def test_a_stop_request_ends_the_call_while_environments_think() -> None:
    requests, conversations = conversations_of([[8]])
    conversations.delay = lambda index, turn: 10**9

    def progress(done: int, total: int, tokens: int) -> None:
        if tokens:
            raise Preempted("the run has to end")

    with pytest.raises(Preempted):
        converse(FakeBalance(), requests, SAMPLING, conversations, progress)  # type: ignore[arg-type]
