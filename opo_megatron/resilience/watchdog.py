"""The watchdog: a thread per rank that ends a hung run and reports which rank hangs, and where.

Every rank's thread writes `status/rank_N.json`: process, phase, step, and a heartbeat count.  A rank that
stays in a phase longer than `run.hang_minutes` reads the others' files: ranks whose count stands still are
stopped or gone and are reported, else the ranks that lag behind.  While another rank makes progress, a rank
waits for it.  All ranks write their stacks to `stacks/`; a stopped rank does so on a signal from another rank
of its machine.  Then every rank exits with code 76, and resume=auto resumes from the last checkpoint.

It watches from the beginning, before a run has its folder: until `show`, files are written by a hang only.

A job that was suspended as a whole continues: a thread that slept much longer than its interval resets the
timer.  Not detected: a single process whose main thread never releases the GIL.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from opo_megatron.distributed.outcome import write_exit
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import EXIT_HUNG
from opo_megatron.utils.signals import keep_in_children, undo_in_children

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks, whatever Python is doing."""
LONGEST_INTERVAL = 10.0
STACKS_SECONDS = 3.0
"""Timeout for the stacks of another rank."""

Status = dict[str, Any]


class Watchdog:
    """Watches the phases of this rank; inactive before `start`, and with a limit of 0."""

    def __init__(self, parallel: Parallel, run_dir: Path, minutes: float) -> None:
        self.parallel, self._limit = parallel, 60 * minutes
        self._interval = min(LONGEST_INTERVAL, self._limit / 10)
        self._status_dir, self._stacks_dir = run_dir / "status", run_dir / "stacks"
        self._phase, self._step, self._since, self._count = "start", 0, time.monotonic(), 0
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._stacks: TextIO | None = None
        self._processes: list[tuple[str, int]] = []
        """Host and process id of every rank: files of an earlier attempt have others."""

    def start(self) -> None:
        """Start watching; a collective of all ranks."""
        if self._limit == 0:
            return
        self._processes = all_gather_objects(self.parallel, (socket.gethostname(), os.getpid()))
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def show(self) -> None:
        """From now on show the phases in files; the run has its folder."""
        if self._limit == 0:
            return
        # Only the thread that receives the signal: other stacks change while they are read.
        faulthandler.register(DUMP_SIGNAL, self._open_stacks(), all_threads=False)
        undo_in_children(self, lambda: faulthandler.unregister(DUMP_SIGNAL))
        self._write()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Start a phase; a new phase is written to the file at once."""
        is_new, self._phase, self._since = phase != self._phase, phase, time.monotonic()
        self._step = self._step if step is None else step
        if is_new and self._stacks is not None:
            with suppress(OSError):  # a full disk ends the run by itself
                self._write()

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase within another one, which continues afterwards."""
        outer = self._phase
        self.enter(phase)
        yield
        self.enter(outer)

    def progress(self) -> None:
        """Record progress within the phase."""
        self._since = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        if self._stacks is not None:
            keep_in_children(self)
            faulthandler.unregister(DUMP_SIGNAL)
            with suppress(OSError):
                self._file_of(self.parallel.rank).unlink()
            self._stacks.close()
            path = self._stacks_of(self.parallel.rank)
            with suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()

    # ------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - before > 5 * self._interval:
                self._since = now  # this process was suspended
            before = now
            if self._stacks is not None:
                with suppress(OSError):  # a full disk ends the run by itself
                    self._write()
            if now - self._since > self._limit:
                self._look_around()

    def _write(self) -> None:
        path = self._file_of(self.parallel.rank)
        partial = path.with_suffix(".partial")
        with self._lock:
            self._count += 1
            status: Status = {
                "rank": self.parallel.rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "phase": self._phase,
                "step": self._step,
                "seconds": round(time.monotonic() - self._since, 1),
                "count": self._count,
            }
            partial.write_text(json.dumps(status))
            os.replace(partial, path)

    def _look_around(self) -> None:
        """End this process, unless another rank still makes progress."""
        stacks = self._open_stacks()
        first = self._read_all()
        for _ in range(3):
            time.sleep(self._interval)
            with suppress(OSError):
                self._write()
        now = self._read_all()
        unresponsive = [one["rank"] for one in now if one["count"] == first[one["rank"]]["count"]]
        working = [one for one in now if one["rank"] not in unresponsive and one["seconds"] <= self._limit]
        if not working:
            self._end(stacks, now, unresponsive)

    def _open_stacks(self) -> TextIO:
        """This rank's file for its stacks, and the folders."""
        for folder in (self._status_dir, self._stacks_dir):
            folder.mkdir(parents=True, exist_ok=True)
        if self._stacks is None:
            self._stacks = self._stacks_of(self.parallel.rank).open("w")
        return self._stacks

    def _end(self, stacks: TextIO, now: list[Status], unresponsive: list[int]) -> None:
        """Write stacks, report the ranks at fault, and exit this process; does not return."""
        faulthandler.dump_traceback(stacks, all_threads=True)
        stacks.flush()
        reporter = min(set(range(self.parallel.world_size)) - set(unresponsive), default=self.parallel.rank)
        self._dump_unresponsive([now[rank] for rank in unresponsive])
        if self.parallel.rank == reporter:
            self._log(now, unresponsive)
        else:
            time.sleep(STACKS_SECONDS)  # the launcher stops all ranks when the first exits
        write_exit(EXIT_HUNG)
        os._exit(EXIT_HUNG)

    def _read_all(self) -> list[Status]:
        return [self._read(rank) for rank in range(self.parallel.world_size)]

    def _read(self, rank: int) -> Status:
        """A rank's file; where it has written none in this attempt, what is known of it."""
        host, pid = self._processes[rank]
        with suppress(OSError):
            status: Status = json.loads(self._file_of(rank).read_text())
            if (status["host"], status["pid"]) == (host, pid):
                return status
        return {
            "rank": rank,
            "host": host,
            "pid": pid,
            "phase": "start",
            "step": 0,
            "seconds": 0.0,
            "count": 0,
        }

    def _dump_unresponsive(self, unresponsive: Sequence[Status]) -> None:
        """Make stopped ranks of this machine write their stacks."""
        for status in unresponsive:
            writes_stacks = status["count"] > 0  # otherwise the signal would end it
            is_here = status["host"] == socket.gethostname() and status["rank"] != self.parallel.rank
            if is_here and writes_stacks:
                # To the main thread, whose id is the pid: a signal to the process may go to any thread.
                ctypes.CDLL(None).tgkill(status["pid"], status["pid"], int(DUMP_SIGNAL))
                with suppress(ProcessLookupError):
                    os.kill(status["pid"], signal.SIGCONT)
        deadline = time.monotonic() + STACKS_SECONDS
        paths = [self._stacks_of(status["rank"]) for status in unresponsive]
        while time.monotonic() < deadline and not all(p.exists() and p.stat().st_size for p in paths):
            time.sleep(0.05)

    def _log(self, all_ranks: Sequence[Status], unresponsive: Sequence[int]) -> None:
        if unresponsive:
            at_fault, what = list(unresponsive), "is stopped or gone"
        else:
            at_fault, what = _outliers(all_ranks), "makes no progress"
        names = "; ".join(
            f"rank {rank} {what} in phase {all_ranks[rank]['phase']} of step {all_ranks[rank]['step']} "
            f"(process {all_ranks[rank]['pid']} on {all_ranks[rank]['host']})"
            for rank in at_fault
        )
        waited = all_ranks[self.parallel.rank]["seconds"]
        message = (
            f"error: the run has hung for {waited:.0f} s: {names}; stacks of all ranks are in "
            f"{self._stacks_dir}; resume with resume=auto, or raise run.hang_minutes if the phase is slow"
        )
        print(message, file=sys.stderr, flush=True)

    def _file_of(self, rank: int) -> Path:
        return self._status_dir / f"rank_{rank:05d}.json"

    def _stacks_of(self, rank: int) -> Path:
        return self._stacks_dir / f"rank_{rank:05d}.txt"


def _outliers(all_ranks: Sequence[Status]) -> list[int]:
    """The ranks in another phase than most; all ranks if they are in the same phase."""
    phases = Counter((one["step"], one["phase"]) for one in all_ranks)
    (most, _), *_ = phases.most_common(1)
    others = [one["rank"] for one in all_ranks if (one["step"], one["phase"]) != most]
    return others or [one["rank"] for one in all_ranks]
