"""Ends this process on a second SIGTERM or SIGINT, whatever its main thread does.

The first SIGTERM asks a run to save and stop, the first SIGINT raises KeyboardInterrupt; both need the main
thread to run Python.  A main thread in a collective that hangs, or in a verifier that never returns, does
not.  So a thread is woken by a descriptor that Python's C handler writes every signal to.  Where the main
thread holds the interpreter lock but looks for signals (a regular expression), the handler itself counts.

Not covered: a main thread that does neither.  The launcher kills it after a grace period.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from opo_megatron.distributed.outcome import claim_error, ended_by_second, write_exit
from opo_megatron.utils.signals import REPEAT_SECONDS, keep_in_children, undo_in_children

ENDING = (signal.SIGTERM, signal.SIGINT)
FIRST = "SIGTERM: the run saves at the end of this step and stops; a second one ends it at once"
_CLOSE = b"\0"
"""Written to the descriptor to end the thread; no signal has this number."""


class SecondSignal:
    """Active between `listen` and `close`, which the main thread calls."""

    def __init__(self, announces: bool) -> None:
        """
        Args:
            announces: whether the first SIGTERM is answered by a line.
        """
        self._announces = announces
        self._thread: threading.Thread | None = None
        self._ends = threading.Lock()
        """Taken by the one of two that ends the process."""
        self._first: dict[str, float] = {}
        """Time of the first signal, by who saw it: the main thread may handle late what the thread saw."""

    def listen(self) -> None:
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._sender, False)
        self._previous = signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)
        undo_in_children(self, _forget_descriptor)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="second signal")
        self._thread.start()

    def close(self) -> None:
        if self._thread is None:
            return
        keep_in_children(self)
        signal.set_wakeup_fd(self._previous)
        os.write(self._sender, _CLOSE)
        self._thread.join()
        self._thread = None
        os.close(self._sender)
        os.close(self._receiver)

    def handled(self, number: int) -> None:
        """Called by the main thread's handler of a signal."""
        self._count("handler", number)

    def _watch(self) -> None:
        while (signals := os.read(self._receiver, 1)) != _CLOSE:
            self._count("thread", signals[0])

    def _count(self, who: str, number: int) -> None:
        if number not in ENDING:
            return
        now = time.monotonic()
        if who not in self._first:
            self._first[who] = now
            if who == "thread" and self._announces and number == signal.SIGTERM:
                _print(FIRST)
        elif now - self._first[who] >= REPEAT_SECONDS and self._ends.acquire(blocking=False):
            _end(number)


def _forget_descriptor() -> None:
    signal.set_wakeup_fd(-1)


def _end(number: int) -> None:
    name = signal.Signals(number).name
    code = 128 + number
    if claim_error(code):
        _print(ended_by_second(name))
    write_exit(code)
    os._exit(code)


def _print(line: str) -> None:
    """Past Python's buffers, whose lock the main thread may hold."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())
