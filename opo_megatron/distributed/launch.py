"""Launches the ranks of a run on this machine as child processes and stops them together.

A plain parent process, without an elastic agent: it sets the environment variables of
`torch.distributed`, forwards SIGTERM, SIGUSR1 and SIGINT, and waits.  When one rank fails, the others
would hang in a collective, so they are stopped; a second SIGINT stops all ranks.  For several machines
use torchrun.
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
"""Environment variable set in the processes that `run_ranks` starts."""
ERROR_CLAIM = "OPO_ERROR_CLAIM"
"""Environment variable with the path of a file; only the rank that creates it prints its user error."""

GRACE_SECONDS = 10.0
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1

Ranks = list[subprocess.Popen[bytes]]


def run_ranks(command: list[str], nproc: int, threads_per_rank: int = 1) -> int:
    """Run `command` as `nproc` ranks and wait for all of them.

    Returns:
        0 if every rank returned 0, else the exit code of the first that failed; 128 + n for a rank
        killed by signal n.

    Call from the main thread, the only one that can handle signals.
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
            stop_ranks(ranks)


def stop_ranks(ranks: Ranks, grace_seconds: float = GRACE_SECONDS) -> None:
    """Send SIGTERM to each running rank, and SIGKILL to those that outlive the grace period."""
    for process in ranks:
        process.terminate()  # no effect on a finished process
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
    # In a new session, so that Ctrl-C reaches the rank only once, through the parent.
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )


def die_with_parent() -> Callable[[], None] | None:
    """A `preexec_fn` that kills the child when its parent dies, even by SIGKILL (Linux only)."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def set_parent_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before prctl
            os._exit(1)

    return set_parent_death_signal


@contextlib.contextmanager
def _forwarding(ranks: Ranks) -> Iterator[set[int]]:
    """Forward signals to the ranks; yields the set of signals forwarded so far."""
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
    """Block until all ranks are done or one has failed; returns the first failure."""
    finished: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def watch(rank: int) -> None:
        finished.put((rank, ranks[rank].wait()))

    # One blocked thread per rank keeps the order of failures within a millisecond.
    for rank in range(len(ranks)):
        threading.Thread(target=watch, args=(rank,), daemon=True).start()
    preempted = False
    for _ in ranks:
        rank, code = finished.get()
        if code == EXIT_PREEMPTED:  # all ranks have agreed to stop
            preempted = True
        elif code > 0:
            return code
        if code < 0:
            if -code not in forwarded:
                name = signal.Signals(-code).name
                print(
                    f"error: rank {rank} was killed by {name}; the other ranks are stopped", file=sys.stderr
                )
            return 128 - code
    return EXIT_PREEMPTED if preempted else 0
