"""A thread per rank that ends a run which makes no progress, and says which rank is to blame and where.

Every rank's thread writes `status/rank_N.json`: process, phase, step, and a count that goes on as long as
the process runs.  A rank that stays in a phase longer than `run.hang_minutes` looks at the others': who does
not count any more is stopped or gone, and is named; else those are that the others are ahead of.  All
write their stacks to `stacks/`; a rank that is stopped is made to, by a signal of a neighbour on its
machine.  Then every rank ends with exit code 76, and resume=auto goes on from the last checkpoint.

A job that was suspended as a whole goes on: a thread that has slept for longer than it meant to forgives.
What is left out: a single process whose main thread keeps Python's lock for good.
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
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import EXIT_HUNG

DUMP_SIGNAL = signal.SIGUSR2
"""Makes a rank write its stacks, whatever Python is doing."""
LONGEST_INTERVAL = 10.0
STACKS_SECONDS = 3.0
"""How long a neighbour's stacks are waited for."""

Status = dict[str, Any]


class Watchdog:
    """Watches the phases of this rank; does nothing before `start` and where the limit is 0."""

    def __init__(self, parallel: Parallel, run_dir: Path, minutes: float) -> None:
        self.parallel, self._limit = parallel, 60 * minutes
        self._interval = min(LONGEST_INTERVAL, self._limit / 10)
        self._status_dir, self._stacks_dir = run_dir / "status", run_dir / "stacks"
        self._phase, self._step, self._since, self._count = "start", 0, time.monotonic(), 0
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._stacks: TextIO | None = None

    def start(self) -> None:
        """Begin to watch; a collective of all ranks."""
        if self._limit == 0:
            return
        for folder in (self._status_dir, self._stacks_dir):
            folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._stacks_of(self.parallel.rank).open("w")
        # Of the thread that gets the signal: those of others change while they are read.
        faulthandler.register(DUMP_SIGNAL, self._stacks, all_threads=False)
        self._write()
        all_gather_objects(self.parallel, None)  # from here on no file is an earlier attempt's
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase begins; where it is another one, its name is in the file before anything can go wrong."""
        is_new, self._phase, self._since = phase != self._phase, phase, time.monotonic()
        self._step = self._step if step is None else step
        if is_new and self._thread is not None:
            with suppress(OSError):  # a full disk ends the run by itself
                self._write()

    def progress(self) -> None:
        """The phase goes on."""
        self._since = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.unregister(DUMP_SIGNAL)
            with suppress(OSError):
                self._file_of(self.parallel.rank).unlink()
        if self._stacks is not None:
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
            with suppress(OSError):  # a full disk ends the run by itself
                self._write()
            if now - self._since > self._limit:
                self._end()

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

    def _end(self) -> None:
        """Write stacks, name who is to blame, and end this process; does not return."""
        assert self._stacks is not None
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.flush()
        first = self._read_all()
        for _ in range(3):
            time.sleep(self._interval)
            with suppress(OSError):
                self._write()
        now = self._read_all()
        silent = [one["rank"] for one in now if one["count"] == first[one["rank"]]["count"]]
        speaker = min(set(range(self.parallel.world_size)) - set(silent), default=self.parallel.rank)
        self._wake_neighbours([now[rank] for rank in silent])
        if self.parallel.rank == speaker:
            self._log(now, silent)
        else:
            time.sleep(STACKS_SECONDS)  # the launcher ends all ranks when the first has gone
        os._exit(EXIT_HUNG)

    def _read_all(self) -> list[Status]:
        return [json.loads(self._file_of(rank).read_text()) for rank in range(self.parallel.world_size)]

    def _wake_neighbours(self, silent: Sequence[Status]) -> None:
        """Stopped ranks of this machine write their stacks."""
        for status in silent:
            if status["host"] == socket.gethostname() and status["rank"] != self.parallel.rank:
                # To the main thread, whose number is the process's; others take what goes to the process.
                ctypes.CDLL(None).tgkill(status["pid"], status["pid"], int(DUMP_SIGNAL))
                with suppress(ProcessLookupError):
                    os.kill(status["pid"], signal.SIGCONT)
        deadline = time.monotonic() + STACKS_SECONDS
        paths = [self._stacks_of(status["rank"]) for status in silent]
        while time.monotonic() < deadline and not all(p.exists() and p.stat().st_size for p in paths):
            time.sleep(0.05)

    def _log(self, all_ranks: Sequence[Status], silent: Sequence[int]) -> None:
        if silent:
            blamed, what = list(silent), "is stopped or gone"
        else:
            blamed, what = _behind(all_ranks), "makes no progress"
        names = "; ".join(
            f"rank {rank} {what} in phase {all_ranks[rank]['phase']} of step {all_ranks[rank]['step']} "
            f"(process {all_ranks[rank]['pid']} on {all_ranks[rank]['host']})"
            for rank in blamed
        )
        waited = all_ranks[self.parallel.rank]["seconds"]
        sentence = (
            f"error: the run hangs since {waited:.0f} s: {names}; stacks of all ranks are in "
            f"{self._stacks_dir}; go on with resume=auto, or raise run.hang_minutes if that was work"
        )
        print(sentence, file=sys.stderr, flush=True)

    def _file_of(self, rank: int) -> Path:
        return self._status_dir / f"rank_{rank:05d}.json"

    def _stacks_of(self, rank: int) -> Path:
        return self._stacks_dir / f"rank_{rank:05d}.txt"


def _behind(all_ranks: Sequence[Status]) -> list[int]:
    """The ranks that are elsewhere than most; all where they are in the same phase."""
    places = Counter((one["step"], one["phase"]) for one in all_ranks)
    (most, _), *_ = places.most_common(1)
    others = [one["rank"] for one in all_ranks if (one["step"], one["phase"]) != most]
    return others or [one["rank"] for one in all_ranks]
