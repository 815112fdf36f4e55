"""Conversations in this process, their environments, and random rollouts with given tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import pytest
import torch

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.conversations import Answer, ConversationLedger, Limits
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.tasks.base import Prompt
from tests.support.fixtures import VOCAB_SIZE, ragged_rollouts

LONGEST = 64
STOPS = (0, 1, 2, 3)
"""Many, so that turns are short and of all lengths."""
Delay = Callable[[int, int], int]


def at_once(index: int, turn: int) -> int:
    return 0


def some_time(index: int, turn: int) -> int:
    return (7 * index + 5 * turn) % 6


def conversations(
    prompts: list[list[int]], responses: list[list[int]], given: list[list[tuple[int, int]]]
) -> Rollouts:
    """Args:
    given: by sample, (token, response tokens before it).
    """
    rollouts = Rollouts.from_demonstrations(prompts, responses)
    rollouts.given_lengths = torch.tensor([len(one) for one in given], dtype=torch.int64)
    rollouts.given_tokens = torch.tensor([token for one in given for token, _ in one], dtype=torch.int64)
    rollouts.given_after = torch.tensor([after for one in given for _, after in one], dtype=torch.int64)
    return rollouts


def with_given_tokens(rollouts: Rollouts, seed: int = 0, longest: int = 4) -> Rollouts:
    """The same samples with tokens given at random places before the last response token; some have none."""
    rng = random.Random(seed)
    tokens: list[int] = []
    after: list[int] = []
    lengths = []
    for length in rollouts.response_lengths.tolist():
        places = range(1, length)
        cuts = sorted(rng.sample(places, rng.randint(0, min(3, len(places)))))
        given = [cut for cut in cuts for _ in range(rng.randint(1, longest))]
        after += given
        tokens += [rng.randrange(VOCAB_SIZE) for _ in given]
        lengths.append(len(given))
    rollouts.given_lengths = torch.tensor(lengths, dtype=torch.int64)
    rollouts.given_tokens = torch.tensor(tokens, dtype=torch.int64)
    rollouts.given_after = torch.tensor(after, dtype=torch.int64)
    return rollouts


def ragged_conversations(count: int = 24, seed: int = 0) -> Rollouts:
    """`ragged_rollouts` with up to three stretches of given tokens in a sample."""
    return with_given_tokens(ragged_rollouts(count, seed), seed)


def merged(rollouts: Rollouts) -> list[list[tuple[int, bool]]]:
    """By sample, its tokens and whether each was sampled, by a plain loop: the reference."""
    assert rollouts.given_lengths is not None and rollouts.given_tokens is not None
    assert rollouts.given_after is not None
    sequences, p, r, g = [], 0, 0, 0
    for prompt, response, given in zip(
        rollouts.prompt_lengths.tolist(), rollouts.response_lengths.tolist(),
        rollouts.given_lengths.tolist(), strict=True,
    ):  # fmt: skip
        sequence = [(token, False) for token in rollouts.prompt_tokens[p : p + prompt].tolist()]
        waiting = list(
            zip(
                rollouts.given_tokens[g : g + given].tolist(), rollouts.given_after[g : g + given].tolist(),
                strict=True,
            )
        )  # fmt: skip
        for k, token in enumerate(rollouts.response_tokens[r : r + response].tolist()):
            while waiting and waiting[0][1] <= k:
                sequence.append((waiting.pop(0)[0], False))
            sequence.append((token, True))
        assert not waiting
        sequences.append(sequence)
        p, r, g = p + prompt, r + response, g + given
    return sequences


@dataclass
class Scripted:
    """An environment that answers turn t with `answers[t]`, and then ends; the reward is a function of all
    sampled tokens."""

    answers: Sequence[Sequence[int]]
    judge: Callable[[list[int]], float] = lambda tokens: float(sum(tokens) % 2)
    sampled: list[int] = field(default_factory=list)
    turns: int = 0

    def respond(self, tokens: Sequence[int]) -> tuple[int, ...] | None:
        self.sampled += tokens
        self.turns += 1
        return tuple(self.answers[self.turns - 1]) if self.turns <= len(self.answers) else None

    def reward(self) -> float:
        return self.judge(self.sampled)


class InProcess:
    """The reference implementation of `Conversations`: environments answer at once, or after some calls.

    Args:
        delay: (request, turn) → how many calls of `ready` an answer takes.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        environments: Sequence[Scripted],
        limits: Limits,
        delay: Callable[[int, int], int] = lambda index, turn: 0,
    ) -> None:
        self.ledger, self.environments, self.delay = ConversationLedger(requests, limits), environments, delay
        self.waiting: list[tuple[int, Answer]] = []
        self.turns = [0] * len(requests)
        self.is_closed = False

    def left(self, index: int) -> int:
        return self.ledger.left(index)

    def respond(self, index: int, tokens: Sequence[int], finish: int) -> None:
        environment = self.environments[index]
        self.ledger.turn(index, tokens, finish)
        given = environment.respond(tokens)
        if not self.ledger.continues(index, given):
            given = None
            self.ledger.end(index, environment.reward())
        self.waiting.append((self.delay(index, self.turns[index]), (index, given)))
        self.turns[index] += 1

    def ready(self, timeout: float) -> list[Answer]:
        if timeout and self.waiting and min(calls for calls, _ in self.waiting) > 0:
            time.sleep(min(timeout, 0.001))
        answers = [answer for calls, answer in self.waiting if calls <= 0]
        self.waiting = [(calls - 1, answer) for calls, answer in self.waiting if calls > 0]
        return answers

    def rewards(self) -> torch.Tensor:
        return self.ledger.rewards()

    def finish_reasons(self) -> torch.Tensor:
        return self.ledger.finish_reasons()

    def close(self) -> None:
        self.is_closed = True


@dataclass
class InProcessEnvironments:
    """The reference implementation of `Environments`."""

    make: Callable[[Prompt], Scripted]
    max_turns: int
    max_sequence_length: int
    failures: int = 0
    delay: Callable[[int, int], int] = lambda index, turn: 0

    @property
    def fingerprint(self) -> dict[str, str]:
        return {}

    def open(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[Prompt], sampling: Sampling
    ) -> InProcess:
        limits = Limits(self.max_turns, sampling.max_tokens, self.max_sequence_length)
        return InProcess(requests, [self.make(prompt) for prompt in prompts], limits, self.delay)

    def close(self) -> None:
        pass


def requests_of(count: int = 12, seed: int = 0) -> list[GenerationRequest]:
    rng = random.Random(seed)
    return [
        GenerationRequest(i, i, 0, tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 9))))
        for i in range(count)
    ]


def environments_of(count: int = 12, turns: int = 4, seed: int = 1) -> list[Scripted]:
    """Answers of 1 to 5 tokens to all turns but the last; every third sample has fewer turns."""
    rng = random.Random(seed)
    return [
        Scripted(
            [
                [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 5))]
                for _ in range(turns - 1 if i % 3 else i % turns)
            ]
        )
        for i in range(count)
    ]  # fmt: skip


def differences(policy: Policy, rollouts: Rollouts) -> list[list[float]]:
    """By turn, max |Δ log π| of the training pass and the engine in each conversation."""
    rollouts.advantages = torch.ones(len(rollouts), dtype=torch.float64)
    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(0))
    metrics = policy.checked_gradients(batch, schedule, PolicyGradient(100.0, 0.8))
    assert metrics.mismatch is not None and batch.engine_log_prob is not None
    per_token = (policy.log_probs(batch, schedule, 0.8) - batch.engine_log_prob).abs()
    by_turn: list[list[float]] = []
    values = iter(per_token.tolist())
    for sequence in merged(batch):
        prompt = next(i for i, (_, sampled) in enumerate(sequence) if sampled)
        turns = [[*part] for sampled, part in groupby(sequence[prompt:], lambda one: one[1]) if sampled]
        for turn, tokens in enumerate(turns):
            by_turn += [[]] * (turn >= len(by_turn))
            by_turn[turn] = [*by_turn[turn], max(next(values) for _ in tokens)]
    assert metrics.mismatch.max == pytest.approx(float(per_token.max()), abs=2e-6)
    return by_turn
