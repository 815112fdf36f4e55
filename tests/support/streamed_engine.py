"""A local engine that delivers its responses one by one, in a chosen order, as SGLang's engine does.

Its responses are a function of their request, so that one which is asked for again is continued."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.rollout.engine import Deliver, GenerationRequest, Progress, Sampling

PAUSE_SECONDS = 0.15
"""Longer than the trainer waits for new responses, so that parts are trained on meanwhile."""


class StreamedEngine:
    """`engine`, whose responses end in an order that the seed chooses."""

    def __init__(self, engine: Any, seed: int, pauses: int = 5) -> None:
        """Args:
        pauses: how often a call waits, so that the trainer sees what has ended.
        """
        self._engine, self._seed, self._pauses = engine, seed, pauses
        self.continues = False
        """Whether it says that it continues after a failure."""
        self.asked: list[list[GenerationRequest]] = []
        """The requests of every call that delivers."""
        self.change: Callable[[Rollouts], None] = lambda rollouts: None
        """Called with the responses of a step before they are delivered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def kept_tokens(self, sampling: Sampling) -> int | None:
        return 1000 if self.continues else None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        deliver: Deliver | None = None,
    ) -> Rollouts:
        rollouts: Rollouts = self._engine.generate(requests, sampling, progress)
        if deliver is None:
            return rollouts
        self.asked.append(list(requests))
        self.change(rollouts)
        count, draw = len(requests), random.Random(self._seed)
        # Half in order, forwards or backwards, so that some groups are complete long before others.
        ends = [(i if self._seed % 2 else count - i) + 0.5 * count * draw.random() for i in range(count)]
        order = sorted(range(count), key=ends.__getitem__)
        every = max(1, len(order) // (self._pauses + 1))
        for ended, i in enumerate(order, 1):
            deliver(rollouts.select([i]))
            if ended % every == 0 and ended < count:
                time.sleep(PAUSE_SECONDS)
        return rollouts
