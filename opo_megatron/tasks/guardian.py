"""What surrounds a process that runs code of others: it ends with its parent, and so do all that it started.

A guardian forks a child that does the work.  Processes that the child leaves behind become the guardian's
own children, because it is a subreaper, and it kills them when the child has ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, number: int) -> None:
    """Get a signal when the parent ends; exit if it has ended already."""
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before prctl
        os._exit(1)


def kill_descendants() -> None:
    """Kill and wait for all children, until there are none."""
    try:
        while True:
            for pid in children():
                os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)
    except ChildProcessError:  # there are none left
        pass


def children() -> list[int]:
    """The children of this process's main thread."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
