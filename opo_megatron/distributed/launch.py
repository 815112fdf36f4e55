"""Launches the ranks of a run on this machine as child processes and stops them together.

A plain parent process, without an elastic agent: it sets the environment variables of
`torch.distributed`, forwards SIGTERM, SIGUSR1 and SIGINT, and waits.  When one rank fails, the others
would hang in a collective, so they are stopped; a second SIGTERM or SIGINT stops all ranks.  A rank that
exits without having come to its end has failed, whatever its exit code is (`outcome.py`).  For several
machines use torchrun.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

from opo_megatron.distributed.outcome import (
    ERROR_CLAIM,
    OUTCOME,
    claim,
    ended_by_second,
    ended_early,
    exit_line,
)
from opo_megatron.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED
from opo_megatron.utils.signals import REPEAT_SECONDS, SignalHandlers

CHILD = "OPO_CHILD"
"""Environment variable set in the processes that `run_ranks` starts."""

GRACE_SECONDS = 10.0
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_OTHERS = "the other ranks are stopped"
_PR_SET_PDEATHSIG = 1

Ranks = list[subprocess.Popen[bytes]]


@dataclass
class _Job:
    """The ranks, the files they share with this process, and the signals forwarded to them."""

    claim: IO[bytes]
    outcomes: Sequence[IO[bytes]]
    """One file per rank."""
    ranks: Ranks = field(default_factory=list)
    forwarded: dict[int, float] = field(default_factory=dict)
    """Signals with the time of the first one."""


class _SecondSigterm(Exception):
    """Raised in the main thread."""


def run_ranks(command: list[str], nproc: int, threads_per_rank: int = 1, writes_outcome: bool = False) -> int:
    """Run `command` as `nproc` ranks and wait for all of them.

    Args:
        writes_outcome: whether the command is `opo`, which writes how it ended.

    Returns:
        0 if every rank returned 0, else the exit code of the first that failed; 128 + n for a rank
        killed by signal n.

    Call from the main thread, the only one that can handle signals.
    """
    with contextlib.ExitStack() as files:
        # Files without a name, which no clean-up of TMPDIR can delete.
        claim_file, *outcomes = (
            files.enter_context(tempfile.TemporaryFile(prefix="opo-")) for _ in range(1 + nproc)
        )
        job = _Job(claim_file, list(outcomes))
        environment = _shared_environment(nproc, threads_per_rank) | {ERROR_CLAIM: str(claim_file.fileno())}
        try:
            with _forwarding(job):
                for rank in range(nproc):
                    _start(command, environment, rank, job)
                return _wait(job, writes_outcome)
        except _SecondSigterm:
            if claim(job.claim.fileno(), 128 + signal.SIGTERM):
                print(ended_by_second("SIGTERM"), file=sys.stderr, flush=True)
            return 128 + signal.SIGTERM
        finally:
            stop_ranks(job.ranks)


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


def _shared_environment(nproc: int, threads_per_rank: int) -> dict[str, str]:
    environment = {
        **os.environ,
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        CHILD: "1",
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank))
    return environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(command: list[str], environment: dict[str, str], rank: int, job: _Job) -> None:
    # In a new session, so that Ctrl-C reaches the rank only once, through the parent.
    outcome = job.outcomes[rank].fileno()
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), OUTCOME: str(outcome)}
    process = subprocess.Popen(
        command,
        env=environment | own,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_parent(),
        pass_fds=(job.claim.fileno(), outcome),
    )
    job.ranks.append(process)
    for number in job.forwarded:  # before this rank was there
        process.send_signal(number)


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
def _forwarding(job: _Job) -> Iterator[None]:
    """Forward signals to the ranks; a second SIGTERM or SIGINT raises, so that all ranks are stopped."""

    def forward(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in job.forwarded:
            raise KeyboardInterrupt
        first = job.forwarded.setdefault(number, time.monotonic())
        for process in job.ranks:
            process.send_signal(number)
        if number == signal.SIGTERM and time.monotonic() - first >= REPEAT_SECONDS:
            raise _SecondSigterm

    handlers = SignalHandlers(_FORWARDED, forward)
    handlers.install()
    try:
        yield
    finally:
        handlers.restore()


def _wait(job: _Job, writes_outcome: bool) -> int:
    """Block until all ranks are done or one has failed; returns the first failure."""
    finished: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def watch(rank: int) -> None:
        finished.put((rank, job.ranks[rank].wait()))

    # One blocked thread per rank keeps the order of failures within a millisecond.
    for rank in range(len(job.ranks)):
        threading.Thread(target=watch, args=(rank,), daemon=True).start()
    preempted = False
    for _ in job.ranks:
        rank, code = finished.get()
        if writes_outcome and code >= 0 and (error := _untold(job, rank, code)) is not None:
            _print_error(job, error, EXIT_FAILED)
            return EXIT_FAILED
        if code == EXIT_INTERRUPTED and signal.SIGINT not in job.forwarded:
            _print_error(job, f"rank {rank} was interrupted by SIGINT or KeyboardInterrupt; {_OTHERS}", code)
        if code == EXIT_PREEMPTED:  # all ranks have agreed to stop
            preempted = True
        elif code > 0:
            return code
        if code < 0:
            if -code not in job.forwarded:
                _print_error(
                    job, f"rank {rank} was killed by {signal.Signals(-code).name}; {_OTHERS}", 128 - code
                )
            return 128 - code
    return EXIT_PREEMPTED if preempted else 0


def _untold(job: _Job, rank: int, code: int) -> str | None:
    """The error of a rank that did not write the exit code that it ended with."""
    if code == EXIT_FAILED:  # Python's after an exception, whose traceback says why
        return None
    told = os.pread(job.outcomes[rank].fileno(), 1000, 0).decode().partition("\n")[0]
    return None if told == exit_line(code) else ended_early(f"rank {rank}", code, told)


def _print_error(job: _Job, message: str, code: int) -> None:
    """Print an error unless a rank has; ranks that lose this one print none."""
    if claim(job.claim.fileno(), code):
        print(f"error: {message}", file=sys.stderr, flush=True)
