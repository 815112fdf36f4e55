"""When a run has to end before its last step: a signal to any rank, or a budget of minutes.

SIGTERM and SIGUSR1 only leave a note; nothing is torn.  At the end of every step all ranks agree, by
one small reduction, whether any has such a note; then the step is saved and all leave with exit code
75.  Drawing may take long, so it is cut: a rank with a note tells the others through the store of the
process group, each looks there once a second, and the step is drawn again by the next attempt, being
a function of (seed, step).  Evaluations and optimizer steps run to their end.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOOK_EVERY_SECONDS = 1.0
_KEY = "opo/stop"
_BUDGET = 1000
"""Beyond all numbers of signals."""


class StopRequest:
    """This rank's note that the run has to end, and what all ranks make of it."""

    def __init__(self, parallel: Parallel, max_minutes: float) -> None:
        self._parallel, self._max_minutes = parallel, max_minutes
        self._started = self._looked_at = time.monotonic()
        self._signal = 0
        self._is_told = False
        self._previous: dict[int, Any] = {}

    def listen(self) -> None:
        """From now on a signal leaves a note and no more (in the main thread, the only one that may)."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._flag) for number in SIGNALS}

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _flag(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _reason(self) -> int:
        if self._signal:
            return self._signal
        seconds = time.monotonic() - self._started
        return _BUDGET if 0 < 60 * self._max_minutes <= seconds else 0

    def raise_if_stopping(self) -> None:
        """
        Raises:
            Preempted: where this rank or, as far as is known, another has a note.
        """
        reason = self._reason()
        if self._parallel.world_size > 1:
            reason = self._exchange(reason)
        if reason:
            raise Preempted(_words(reason))

    def _exchange(self, reason: int) -> int:
        """Tell the others, or look whether another has told."""
        store = dist.distributed_c10d._get_default_store()
        if reason and not self._is_told:
            store.set(_KEY, str(reason))
            self._is_told = True
        now = time.monotonic()
        if not reason and now - self._looked_at >= LOOK_EVERY_SECONDS:
            self._looked_at = now
            if store.check([_KEY]):
                reason = int(store.get(_KEY))
        return reason

    def agree(self, *flags: bool) -> tuple[str | None, list[bool]]:
        """Why the run has to end, or None; and whether each of `flags` holds on any rank.  A collective."""
        values = torch.tensor([self._reason(), *map(int, flags)], dtype=torch.int64)
        reason, *others = all_reduce(self._parallel, values, dist.ReduceOp.MAX).tolist()
        return _words(reason) if reason else None, [bool(value) for value in others]


def _words(reason: int) -> str:
    return "run.max_minutes are over" if reason == _BUDGET else signal.Signals(reason).name
