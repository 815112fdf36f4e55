"""Conversations over SGLang servers: every turn is a request of its own, with all tokens so far.

The server finds the keys and values of earlier turns in its prefix cache.  Turns of different conversations
do not wait for each other: a turn is posted as soon as its environment has answered.  The random numbers of a
turn continue those of the turn before: they belong to the count of sampled tokens in exact mode, and to
positions in the sequence otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from opo_megatron.rollout.conversations import Conversations, GivenTokens
from opo_megatron.rollout.engine import GenerationRequest, Progress, Sampling
from opo_megatron.rollout.sglang.balance import Balance
from opo_megatron.rollout.sglang.replies import finish_reason_of, spans_of, versions_of

POSTS = 256
"""Turns of a rank at the same time."""
ANSWER_SECONDS = 0.01
"""Interval at which answers of environments are noticed while servers generate."""
WAIT_SECONDS = 1.0
"""Interval at which a stop request is noticed."""


class _Sample:
    """What has been sampled of one conversation, and all its tokens."""

    def __init__(self, request: GenerationRequest) -> None:
        self.tokens = list(request.tokens)
        self.ids: list[int] = []
        self.log_probs: list[Any] = []
        self.versions: list[int] = []
        self.last: dict[str, Any] = {}
        """`meta_info` of the last turn, whose experts are those of all tokens."""

    def add(self, reply: Any) -> list[int]:
        """A turn has ended; returns its tokens."""
        ids, self.last = list(reply["output_ids"]), reply["meta_info"]
        self.tokens += ids
        self.ids += ids
        self.log_probs += self.last.get("output_token_logprobs") or []
        self.versions += versions_of(self.last, len(ids))
        return ids

    def reply(self) -> dict[str, Any]:
        """A reply with the sampled tokens of all turns."""
        own = {"output_token_logprobs": self.log_probs, "weight_versions": spans_of(self.versions)}
        return {"output_ids": self.ids, "meta_info": self.last | own}


def converse(
    balance: Balance,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    conversations: Conversations,
    progress: Progress | None,
) -> tuple[list[Any], GivenTokens]:
    """One reply per request, with what was sampled in all turns, and what was given between them.

    Raises:
        EngineFailure, UserError: as any request.
        Preempted: from `progress`.
    """
    samples, given = [_Sample(request) for request in requests], GivenTokens(len(requests))
    running: dict[Future[list[Any]], int] = {}
    thinking = ended = sampled = 0
    threads = ThreadPoolExecutor(min(POSTS, max(1, len(requests))))

    def post(index: int) -> None:
        sample = samples[index]
        request = replace(requests[index], tokens=tuple(sample.tokens))
        limited = replace(sampling, max_tokens=conversations.left(index))
        # The key of a turn's random numbers is the conversation's: it has no part in the turn's tokens.
        turn = threads.submit(balance.post, [request], limited, sampled=[len(sample.ids)])
        running[turn] = index

    try:
        for index in range(len(requests)):
            post(index)
        while running or thinking:
            if running:
                done, _ = wait(running, ANSWER_SECONDS if thinking else WAIT_SECONDS, FIRST_COMPLETED)
                for turn in done:
                    index = running.pop(turn)
                    (reply,) = turn.result()
                    ids = samples[index].add(reply)
                    reason = finish_reason_of(
                        requests[index], ids, samples[index].last["finish_reason"], sampling
                    )
                    thinking, sampled = thinking + 1, sampled + len(ids)
                    conversations.respond(index, ids, reason)
            for index, tokens in conversations.ready(0.0 if running else WAIT_SECONDS) if thinking else ():
                thinking -= 1
                if tokens is None:
                    ended += 1
                    continue
                given.add(index, tokens, len(samples[index].ids))
                samples[index].tokens += tokens
                post(index)
            if progress is not None:
                progress(ended, len(requests), sampled)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
    return [sample.reply() for sample in samples], given
