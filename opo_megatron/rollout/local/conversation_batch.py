"""Decoding of conversations: a row of the cache continues behind the tokens that its environment gives.

A row samples a turn, waits for its environment, is given tokens, and samples again.  Given tokens go through
the same decoding passes as sampled ones, one for each pass, so that their keys and values are those that the
policy's tokens have; nothing is sampled or recorded for them.  A row that waits is computed like the others,
which writes the same keys and values again, and no row waits for another.  Only where all of them wait is
there nothing to compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opo_megatron.batch.rollouts import FINISH_LENGTH, FINISH_STOP, Rollouts
from opo_megatron.rollout.conversations import Conversations, GivenTokens
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import Batch, Rows

if TYPE_CHECKING:
    from opo_megatron.rollout.local.engine import LocalEngine

WAIT_SECONDS = 0.05
"""Interval at which a stop request is noticed while all environments think."""


class ConversationBatch(Batch):
    """One call of `generate` with conversations."""

    def __init__(
        self,
        engine: LocalEngine,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        conversations: Conversations,
    ) -> None:
        super().__init__(engine, requests, sampling, engine.decoder.model.max_sequence_length)
        self.conversations, self.given = conversations, GivenTokens(len(requests))
        self._forced: dict[int, deque[int]] = {}
        """By request, the given tokens that are still to enter its row."""
        self._thinking: set[int] = set()
        """Requests that wait for their environments."""
        self._begins = [0] * len(requests)
        """Sampled tokens of each request before its current turn."""
        self._ends = [0] * len(requests)
        """The most sampled tokens that it may have at the end of the turn."""

    def advance(self) -> bool:
        self._enter_answers()
        running = self.rows.request.numel()
        if self.admitted < len(self.requests) and running < self.slots:
            first = self.admitted
            self._admit()
            for index in range(first, self.admitted):
                self._begin_turn(index, 0)
            self._end_turns(torch.arange(running, self.rows.request.numel()))
        if len(self._thinking) < self.rows.request.numel():
            self._continue(self._decode(self.rows))
        return self.finished < len(self.requests)

    def _enter_answers(self) -> None:
        """Go on with the conversations that were answered, and free the rows of those that have ended."""
        if not self._thinking:
            return
        can_go_on = len(self._thinking) < self.rows.request.numel()
        is_idle = not can_go_on and (
            self.admitted == len(self.requests) or self.rows.request.numel() == self.slots
        )
        ended = []
        for index, given in self.conversations.ready(WAIT_SECONDS if is_idle else 0.0):
            self._thinking.remove(index)
            if given is None:
                ended.append(index)
                continue
            sampled = self._begins[index]
            self.given.add(index, given, sampled)
            self._forced[index] = deque(given)
            self._begin_turn(index, sampled)
        if ended:
            self._free(torch.isin(self.rows.request, torch.tensor(ended, device=self.device)))

    def _begin_turn(self, index: int, sampled: int) -> None:
        self._begins[index], self._ends[index] = sampled, sampled + self.conversations.left(index)

    def _continue(self, hidden: Tensor) -> None:
        """After a pass: the next token of every row that does not wait, given or sampled."""
        rows = self.rows
        sampling: list[int] = []
        forced: dict[int, int] = {}
        for row, index in enumerate(rows.request.tolist()):
            if index in self._forced:
                tokens = self._forced[index]
                forced[row] = tokens.popleft()
                if not tokens:
                    del self._forced[index]
            elif index not in self._thinking:
                sampling.append(row)
        rows.position[[*sampling, *forced]] += 1
        if forced:
            rows.token[[*forced]] = torch.tensor([*forced.values()], device=self.device)
        if sampling:
            chosen = torch.tensor(sampling, device=self.device)
            part = Rows(*(column[chosen] for column in rows.columns()))
            self._sample(part, hidden[chosen])
            rows.token[chosen], rows.count[chosen] = part.token, part.count
            self._end_turns(chosen)

    def _end_turns(self, chosen: Tensor) -> None:
        """Hand the turns to their environments that end with the token just sampled in the rows `chosen`."""
        rows = self.rows
        of_rows = (rows.request[chosen], rows.count[chosen], torch.isin(rows.token[chosen], self.stop))
        for index, count, stopped in zip(*(column.tolist() for column in of_rows), strict=True):
            if not stopped and count < self._ends[index]:
                continue
            tokens = self.tokens[index, self._begins[index] : count].tolist()
            self._begins[index] = count
            self._thinking.add(index)
            self.conversations.respond(index, tokens, FINISH_STOP if stopped else FINISH_LENGTH)

    def _given_lengths(self) -> Tensor:
        return torch.tensor([self.given.count(i) for i in range(len(self.requests))], dtype=torch.int64)

    def rollouts(self, version: int) -> Rollouts:
        return self.given.entered(super().rollouts(version), self.conversations)
