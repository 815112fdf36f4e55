"""Conversations: turns of the policy, and between them tokens that an environment gives.

An engine samples a turn, up to a stop token or the limit, hands it to `Conversations`, and continues with
other samples.  What the environment answers comes back without blocking: tokens, behind which the same
sample continues, or the end.  Every sampled token thus follows exactly the tokens that the policy was shown,
ids both ways; given tokens are never sampled, never trained on, and have no log-probability.

Every request has one conversation that ends for one of four reasons (`FINISH_NAMES`), and a reward.  Nothing
here selects: an environment that fails gives its declared outcome, and no conversation is dropped or sampled
again for its length or for the time that it took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opo_megatron.batch.rollouts import (
    FINISH_ENVIRONMENT,
    FINISH_LENGTH,
    FINISH_STOP,
    FINISH_TURNS,
    Rollouts,
)
from opo_megatron.errors import UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.tasks.base import Prompt

Answer = tuple[int, tuple[int, ...] | None]
"""(index of the request, the tokens that its environment gave; None where the conversation has ended)."""


class Conversations(Protocol):
    """The environments' side of one call of an engine; used from one thread."""

    def left(self, index: int) -> int:
        """How many tokens the next turn of a request may have, at least 1 while the conversation lasts."""
        ...

    def respond(self, index: int, tokens: Sequence[int], finish: int) -> None:
        """A turn has ended: with a stop token (FINISH_STOP), or after `left` tokens (FINISH_LENGTH)."""
        ...

    def ready(self, timeout: float) -> list[Answer]:
        """What has been answered since the last call, one answer for each turn; waits at most `timeout`
        seconds for the first one.

        Raises:
            UserError: where an environment cannot be used.
        """
        ...

    def rewards(self) -> Tensor:
        """[n] float64 of all requests, once all have ended."""
        ...

    def finish_reasons(self) -> Tensor:
        """[n] int64 of all requests, once all have ended."""
        ...

    def close(self) -> None:
        """Forget what has not ended."""
        ...


class Environments(Protocol):
    """Where conversations come from, for a whole run."""

    failures: int
    """Environments so far that failed and gave their declared outcome."""

    def open(
        self, requests: Sequence[GenerationRequest], prompts: Sequence[Prompt], sampling: Sampling
    ) -> Conversations:
        """The conversations of one call; `requests[i]` begins with the tokens that the environment of
        `prompts[i]` starts with."""
        ...

    def close(self) -> None:
        """Stop the processes."""
        ...


@dataclass(frozen=True)
class Limits:
    """What ends a conversation, besides its environment."""

    max_turns: int
    max_tokens: int
    """Sampled, over all turns."""
    max_sequence_length: int


class ConversationLedger:
    """What each conversation of a call has used up, and how it has ended."""

    def __init__(self, requests: Sequence[GenerationRequest], limits: Limits) -> None:
        self._limits = limits
        self._sampled = [0] * len(requests)
        self._turns = [0] * len(requests)
        self._lengths = [len(request.tokens) for request in requests]
        self._last = [FINISH_STOP] * len(requests)
        self._rewards: list[float | None] = [None] * len(requests)
        self._reasons = [FINISH_ENVIRONMENT] * len(requests)

    def left(self, index: int) -> int:
        """How many tokens may still be sampled."""
        limits = self._limits
        return min(
            limits.max_tokens - self._sampled[index], limits.max_sequence_length - self._lengths[index]
        )

    def turn(self, index: int, tokens: Sequence[int], finish: int) -> None:
        """A turn has ended; its environment is told in any case, because the reward may depend on it."""
        self._turns[index] += 1
        self._sampled[index] += len(tokens)
        self._lengths[index] += len(tokens)
        self._last[index] = finish

    def continues(self, index: int, given: Sequence[int] | None) -> bool:
        """Whether the conversation continues behind what its environment gave; else why not is noted.

        Raises:
            UserError: for no tokens, after which a turn could not be told from the one before.
        """
        if self._last[index] == FINISH_LENGTH:
            self._reasons[index] = FINISH_LENGTH
        elif given is None:
            self._reasons[index] = FINISH_ENVIRONMENT
        elif not given:
            raise UserError(
                "an environment gave no tokens after a turn; return None from respond to end a conversation"
            )
        elif self._turns[index] >= self._limits.max_turns:
            self._reasons[index] = FINISH_TURNS
        elif self.left(index) < 1 or self._fills(index, given):
            self._reasons[index] = FINISH_LENGTH
        else:
            self._lengths[index] += len(given)
            return True
        return False

    def _fills(self, index: int, given: Sequence[int]) -> bool:
        """Whether nothing could be sampled behind these tokens."""
        return self._lengths[index] + len(given) >= self._limits.max_sequence_length

    def end(self, index: int, reward: float) -> None:
        """The conversation has ended with this reward."""
        self._rewards[index] = reward

    def rewards(self) -> Tensor:
        """[n] float64."""
        missing = [i for i, reward in enumerate(self._rewards) if reward is None]
        if missing:
            raise RuntimeError(f"the conversation of request {missing[0]} has not ended")
        return torch.tensor(self._rewards, dtype=torch.float64)

    def finish_reasons(self) -> Tensor:
        """[n] int64."""
        return torch.tensor(self._reasons, dtype=torch.int64)


class GivenTokens:
    """What the environments of a call gave, as columns of `Rollouts`."""

    def __init__(self, count: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._after: list[list[int]] = [[] for _ in range(count)]

    def add(self, index: int, tokens: Sequence[int], sampled: int) -> None:
        """Request `index` has been given tokens behind its first `sampled` ones."""
        self._tokens[index] += tokens
        self._after[index] += [sampled] * len(tokens)

    def count(self, index: int) -> int:
        """Tokens given to a request."""
        return len(self._tokens[index])

    def entered(self, rollouts: Rollouts, conversations: Conversations) -> Rollouts:
        """Finished rollouts, in the order of the requests, with what only their conversations know."""
        rollouts.given_lengths = torch.tensor(list(map(len, self._tokens)), dtype=torch.int64)
        rollouts.given_tokens = torch.tensor([t for one in self._tokens for t in one], dtype=torch.int64)
        rollouts.given_after = torch.tensor([t for one in self._after for t in one], dtype=torch.int64)
        rollouts.rewards = conversations.rewards()
        rollouts.finish_reasons = conversations.finish_reasons()
        return rollouts
