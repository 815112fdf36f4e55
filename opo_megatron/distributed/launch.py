"""Starts the ranks of a run on this machine as child processes, and ends them together.

A plain parent, no elastic agent: it sets the variables that `torch.distributed` reads, passes on
SIGTERM, SIGUSR1 and SIGINT, and waits.  When one rank fails, the others would wait for it in a
collective, so they are ended; a second SIGINT ends them all.  Ranks on several machines are started
by torchrun instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from opo_megatron.errors import EXIT_PREEMPTED

CHILD = "OPO_CHILD"
"""Set in a process that `run_ranks` started."""
ERROR_CLAIM = "OPO_ERROR_CLAIM"
"""Path of a file: the rank that creates it prints its user error, the others keep silent."""

GRACE_SECONDS = 10.0
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1

Ranks = list[subprocess.Popen[bytes]]


def run_ranks(command: list[str], nproc: int, threads_per_rank: int = 1) -> int:
    """Run `command` as `nproc` ranks and wait for all of them.

    Returns:
        0 if every rank returned 0, else the exit code of the first that failed; 128 + n for a rank
        that signal n ended.

    Must be called from the main thread, the only one that may handle signals.
    """
    ranks: Ranks = []
    with tempfile.TemporaryDirectory(prefix="opo-") as folder:
        shared = _shared_environment(nproc, threads_per_rank, Path(folder))
        try:
            for rank in range(nproc):
                ranks.append(_start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            with _forwarding(ranks) as forwarded:
                return _wait(ranks, forwarded)
        finally:
            end_ranks(ranks)


def end_ranks(ranks: Ranks, grace_seconds: float = GRACE_SECONDS) -> None:
    """SIGTERM to each rank that still runs, by its process id, and SIGKILL to those that stay."""
    for process in ranks:
        process.terminate()  # does nothing to a process that has ended
    deadline = time.monotonic() + grace_seconds
    for process in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    for process in ranks:
        process.kill()
        process.wait()


def _shared_environment(nproc: int, threads_per_rank: int, folder: Path) -> dict[str, str]:
    environment = {
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        CHILD: "1",
        ERROR_CLAIM: str(folder / "error-printed"),
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank))
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C reaches the rank once, through the parent, not twice.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )


def die_with_parent() -> Callable[[], None] | None:
    """What a new child runs so that even a SIGKILL of the parent leaves no rank behind (Linux only)."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the request was made
            os._exit(1)

    return bind


@contextlib.contextmanager
def _forwarding(ranks: Ranks) -> Iterator[set[int]]:
    """Pass signals on to the ranks; yields the set of those passed on so far."""
    forwarded: set[int] = set()

    def forward(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in forwarded:
            raise KeyboardInterrupt
        forwarded.add(number)
        for process in ranks:
            process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Ranks, forwarded: set[int]) -> int:
    """Block until all ranks are done or one has failed; the first failure is the one reported."""
    finished: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def watch(rank: int) -> None:
        finished.put((rank, ranks[rank].wait()))

    # A thread per rank, all asleep: ranks that fail within a millisecond still arrive in order.
    for rank in range(len(ranks)):
        threading.Thread(target=watch, args=(rank,), daemon=True).start()
    preempted = False
    for _ in ranks:
        rank, code = finished.get()
        if code == EXIT_PREEMPTED:  # they have agreed to end, so the others are about to
            preempted = True
        elif code > 0:
            return code
        if code < 0:
            if -code not in forwarded:
                name = signal.Signals(-code).name
                print(f"error: rank {rank} was ended by {name}; the other ranks are stopped", file=sys.stderr)
            return 128 - code
    return EXIT_PREEMPTED if preempted else 0
