"""Responses of an engine as they end, while the caller does something else.

The engine generates in a thread of this process, which mostly waits for a server.  Nothing here chooses:
every response is delivered once, in the order in which they end, and a failure is raised where the caller
asks for the next ones.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.errors import Preempted
from opo_megatron.rollout.engine import GenerationRequest, Sampling, StreamingEngine


class Arrivals:
    """One call of `engine.generate` in the background; close it, or use it in a with statement."""

    def __init__(
        self, engine: StreamingEngine, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> None:
        self._changed = threading.Condition()
        self._new: list[Rollouts] = []
        self._is_done = False
        self._error: BaseException | None = None
        self._is_closed = False
        self.finished = self.tokens = 0
        """Responses that have ended, and their tokens."""
        self.began = time.perf_counter()
        self.ended: list[float] = []
        """When each response ended, by `time.perf_counter`."""
        self._thread = threading.Thread(
            target=self._generate, args=(engine, requests, sampling), name="opo-arrivals", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, seconds: float) -> list[Rollouts]:
        """What has ended since the last call; waits at most `seconds` for something new.

        Raises:
            EngineFailure, UserError: what the engine raised.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._new or self._error or self._is_done, seconds)
            if self._error is not None:
                raise self._error
            new, self._new = self._new, []
            return new

    def finish(self) -> None:
        """Wait until the engine has confirmed all that it delivered.

        Raises:
            EngineFailure, UserError: what the engine raised.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Abort what is still generated, and wait for the thread."""
        with self._changed:
            self._is_closed = True
        self._thread.join()

    def _generate(
        self, engine: StreamingEngine, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> None:
        try:
            engine.generate(requests, sampling, self._progress, self._deliver)
        except BaseException as error:  # raised again by `take`
            with self._changed:
                self._error = error
                self._changed.notify_all()
        else:
            with self._changed:
                self._is_done = True
                self._changed.notify_all()

    def _deliver(self, rollouts: Rollouts) -> None:
        with self._changed:
            self._new.append(rollouts)
            self.ended += len(rollouts) * [time.perf_counter()]
            self.finished += len(rollouts)
            self.tokens += int(rollouts.response_lengths.sum())
            self._changed.notify_all()

    def _progress(self, done: int, total: int, tokens: int) -> None:
        with self._changed:
            if self._is_closed:
                raise Preempted("the caller needs no more responses")
