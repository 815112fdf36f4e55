"""Signal handlers of this process alone: children that anybody's code forks have those from before.

A forked child inherits handlers.  One that only sets a flag would make it deaf to `Process.terminate()`, and
one with a wake-up descriptor would report the child's signals to the parent.  (A program that is executed
loses handlers anyway.)  Signals are blocked around a fork, so that none meets an inherited handler.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

REPEAT_SECONDS = 1.0
"""A signal that follows itself sooner is the same one: who signals a group and its leader sends two."""
Handler = Callable[[int, FrameType | None], object]

_undo: dict[int, Callable[[], None]] = {}
"""What a child calls first, by the id of its owner."""
_BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_mask = threading.local()
"""The signals that the forking thread blocked before the fork."""


def undo_in_children(owner: object, undo: Callable[[], None]) -> None:
    """Call `undo` first in every forked child, until `keep_in_children(owner)`."""
    _undo[id(owner)] = undo


def keep_in_children(owner: object) -> None:
    """End `undo_in_children`."""
    _undo.pop(id(owner), None)


class SignalHandlers:
    """One handler for some signals; installed and restored in the main thread, the only one that can."""

    def __init__(self, numbers: Iterable[int], handler: Handler) -> None:
        self._numbers, self._handler = tuple(numbers), handler
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        self._previous = {number: signal.signal(number, self._handler) for number in self._numbers}
        undo_in_children(self, self._restore)

    def restore(self) -> None:
        """The handlers from before; does nothing where none was installed."""
        keep_in_children(self)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def _before_fork() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED) if _undo else None


def _after_fork() -> None:
    if _mask.before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    while _undo:
        _, undo = _undo.popitem()  # the last one first
        undo()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
