"""Processes that grade answers and may hang, crash or eat memory without harm to the run.

Each worker is `python -m opo_megatron.tasks.math_worker`: one JSON line in, one out.  A job that takes
longer than its time, or whose worker dies (its memory is limited), has no result; the worker is killed
and a fresh one takes its place, because what was interrupted inside a library must not grade again.
Workers end with their parent: when its pipe closes, and on Linux also where it is killed.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from opo_megatron.errors import UserError

START_SECONDS = 120.0
"""How long a worker may take to import what it grades with."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    started: float
    job: int | None = None
    """Place of the job that it works on."""
    deadline: float = 0.0
    is_ready: bool = False
    received: bytes = b""


@dataclass
class WorkerPool:
    """`grade` gives rewards in order; workers start with the first call and stay until `close`."""

    count: int
    seconds: float
    """Of one job, at most."""
    memory_mib: int
    """Of one worker's address space."""
    timeouts: int = 0
    crashes: int = 0
    _workers: list[_Worker] = field(default_factory=list)

    def grade(self, jobs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Reward of each (response, answer); None where there is none in time.

        Raises:
            UserError: where workers cannot even start.
        """
        results: list[float | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        selector = selectors.DefaultSelector()
        self._replace_the_dead()
        for worker in self._workers:
            selector.register(_out(worker), selectors.EVENT_READ, worker)
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in self._workers:
                    if worker.is_ready and worker.job is None and waiting:
                        self._give(worker, waiting.popleft(), jobs)
                nearest = min(self._deadline(worker) for worker in self._workers)
                for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                    if not self._receive(key.data, results):
                        self._crashed(key.data, selector)
                for worker in [w for w in self._workers if time.monotonic() >= self._deadline(w)]:
                    if not worker.is_ready:
                        raise UserError(f"a grading worker did not start in {START_SECONDS:.0f} seconds")
                    self.timeouts += 1
                    self._renew(worker, selector)
        except BaseException:
            self.close()  # a worker in the middle of a job would answer the next call
            raise
        finally:
            selector.close()
        return results

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            _end(worker)
        self._workers = []

    def _replace_the_dead(self) -> None:
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            _end(worker)
            self._workers.remove(worker)
        while len(self._workers) < self.count:
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        command = [sys.executable, "-m", "opo_megatron.tasks.math_worker", str(self.memory_mib)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        return _Worker(process, time.monotonic())

    def _deadline(self, worker: _Worker) -> float:
        if not worker.is_ready:
            return worker.started + START_SECONDS
        return worker.deadline if worker.job is not None else float("inf")

    def _give(self, worker: _Worker, job: int, jobs: Sequence[tuple[str, str]]) -> None:
        worker.job, worker.deadline = job, time.monotonic() + self.seconds
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(jobs[job]).encode() + b"\n")
            worker.process.stdin.flush()
        except BrokenPipeError:
            return  # its end is seen where its answers are

    def _receive(self, worker: _Worker, results: list[float | None]) -> bool:
        """Take what a worker wrote; False where it has ended."""
        part = os.read(_out(worker), 65536)
        worker.received += part
        *lines, worker.received = worker.received.split(b"\n")
        for line in lines:
            if not worker.is_ready:
                worker.is_ready = True
                continue
            assert worker.job is not None
            results[worker.job], worker.job = json.loads(line), None
        return bool(part)

    def _crashed(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        if not worker.is_ready:
            code = worker.process.wait()
            raise UserError(
                f"a grading worker ended with code {code} before its first answer (its message is above); "
                "install what it needs with: pip install 'opo-megatron[math]'"
            )
        self.crashes += worker.job is not None
        self._renew(worker, selector)

    def _renew(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(_out(worker))
        _end(worker)
        place = self._workers.index(worker)
        self._workers[place] = self._start()
        selector.register(_out(self._workers[place]), selectors.EVENT_READ, self._workers[place])


def _out(worker: _Worker) -> int:
    assert worker.process.stdout is not None
    return worker.process.stdout.fileno()


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
