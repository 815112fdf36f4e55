"""Stops a run before its last step: on a signal to any rank, or after `run.max_minutes`.

SIGTERM and SIGUSR1 set a flag.  At the end of every step one small all-reduce tells all ranks
whether any flag is set; then the run saves and exits with code 75.  Generation may take long, so it is
interrupted: a flagged rank publishes the stop in the process group's store, which every rank polls once
a second.  The next attempt generates the step again, since it is a function of (seed, step).
Evaluations and optimizer steps are not interrupted.

A second SIGTERM (or SIGINT) ends the process at once (`second_signal.py`).
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.errors import Preempted
from opo_megatron.resilience.second_signal import SecondSignal
from opo_megatron.utils.signals import SignalHandlers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
POLL_SECONDS = 1.0
_KEY = "opo/stop"
_BUDGET = 1000
"""Stands for `run.max_minutes`; above all signal numbers."""


class StopRequest:
    """This rank's stop flag, and the collective decision to stop."""

    def __init__(self, parallel: Parallel, max_minutes: float) -> None:
        self._parallel, self._max_minutes = parallel, max_minutes
        self._started = self._polled_at = time.monotonic()
        self._signal = 0
        self._is_published = False
        self._handlers = SignalHandlers(SIGNALS, self._flag)
        self._second = SecondSignal(announces=parallel.rank == 0)

    def listen(self) -> None:
        """Install the signal handlers, in the main thread, the only one that can."""
        if threading.current_thread() is threading.main_thread():
            self._handlers.install()
            self._second.listen()

    def close(self) -> None:
        self._second.close()
        self._handlers.restore()

    def _flag(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        self._second.handled(number)

    def _reason(self) -> int:
        if self._signal:
            return self._signal
        seconds = time.monotonic() - self._started
        return _BUDGET if 0 < 60 * self._max_minutes <= seconds else 0

    def raise_if_stopping(self) -> None:
        """
        Raises:
            Preempted: if this rank is flagged, or another has published a stop.
        """
        reason = self._reason()
        if self._parallel.world_size > 1:
            reason = self._publish_or_poll(reason)
        if reason:
            raise Preempted(_describe(reason))

    def _publish_or_poll(self, reason: int) -> int:
        """Publish this rank's reason, or poll for another rank's."""
        store = dist.distributed_c10d._get_default_store()
        if reason and not self._is_published:
            store.set(_KEY, str(reason))
            self._is_published = True
        now = time.monotonic()
        if not reason and now - self._polled_at >= POLL_SECONDS:
            self._polled_at = now
            if store.check([_KEY]):
                reason = int(store.get(_KEY))
        return reason

    def agree(self, *flags: bool) -> tuple[str | None, list[bool]]:
        """The reason to stop, or None; and for each of `flags` whether any rank sets it.  A collective."""
        values = torch.tensor([self._reason(), *map(int, flags)], dtype=torch.int64)
        reason, *others = all_reduce(self._parallel, values, dist.ReduceOp.MAX).tolist()
        return _describe(reason) if reason else None, [bool(value) for value in others]


def _describe(reason: int) -> str:
    return "run.max_minutes reached" if reason == _BUDGET else signal.Signals(reason).name
