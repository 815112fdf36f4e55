"""Worker processes for grading, which may hang, crash or use too much memory without harming the run.

Each worker is `python -m opo_megatron.tasks.math_worker`: one JSON line in, one out.  A job that times out,
or whose worker dies (its memory is limited), has no result; the worker is killed and replaced, because an
interrupted library is in an unknown state.  Workers end with their parent: when its pipe closes, and on
Linux also when it is killed.
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
"""Time limit of a worker's imports."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    started: float
    job: int | None = None
    """Index of the job that it works on."""
    deadline: float = 0.0
    is_ready: bool = False
    received: bytes = b""


@dataclass
class WorkerPool:
    """`grade` returns rewards in order; workers start with the first call and run until `close`."""

    count: int
    seconds: float
    """Time limit of a job."""
    memory_mib: int
    """Limit of a worker's address space."""
    grader: str = "math"
    """`math` or `math_strict`."""
    timeouts: int = 0
    crashes: int = 0
    _workers: list[_Worker] = field(default_factory=list)

    def grade(self, jobs: Sequence[tuple[str, ...]]) -> list[float | None]:
        """Reward of each (response, answer[, context]); None where the job timed out or its worker died.

        Raises:
            UserError: where workers cannot start.
        """
        results: list[float | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        selector = selectors.DefaultSelector()
        self._replace_dead_workers()
        for worker in self._workers:
            selector.register(_out(worker), selectors.EVENT_READ, worker)
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in self._workers:
                    if worker.is_ready and worker.job is None and waiting:
                        self._send(worker, waiting.popleft(), jobs)
                nearest = min(self._deadline(worker) for worker in self._workers)
                for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                    if not self._receive(key.data, results):
                        self._crashed(key.data, selector)
                for worker in [w for w in self._workers if time.monotonic() >= self._deadline(w)]:
                    if not worker.is_ready:
                        raise UserError(f"a grading worker did not start within {START_SECONDS:.0f} seconds")
                    self.timeouts += 1
                    self._replace(worker, selector)
        except BaseException:
            self.close()  # a worker in the middle of a job would reply to the next call
            raise
        finally:
            selector.close()
        return results

    def close(self) -> None:
        """Kill all workers."""
        for worker in self._workers:
            _kill(worker)
        self._workers = []

    def _replace_dead_workers(self) -> None:
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            _kill(worker)
            self._workers.remove(worker)
        while len(self._workers) < self.count:
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        command = [sys.executable, "-m", "opo_megatron.tasks.math_worker", str(self.memory_mib), self.grader]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        return _Worker(process, time.monotonic())

    def _deadline(self, worker: _Worker) -> float:
        if not worker.is_ready:
            return worker.started + START_SECONDS
        return worker.deadline if worker.job is not None else float("inf")

    def _send(self, worker: _Worker, job: int, jobs: Sequence[tuple[str, ...]]) -> None:
        worker.job, worker.deadline = job, time.monotonic() + self.seconds
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(jobs[job]).encode() + b"\n")
            worker.process.stdin.flush()
        except BrokenPipeError:
            return  # `_receive` notices that the worker has ended

    def _receive(self, worker: _Worker, results: list[float | None]) -> bool:
        """Read a worker's replies; False where it has ended."""
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
                f"a grading worker ended with code {code} before its first reply (its error is above); "
                "check task.verifier_memory_mib, or install its packages: pip install 'opo-megatron[math]'"
            )
        self.crashes += worker.job is not None
        self._replace(worker, selector)

    def _replace(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(_out(worker))
        _kill(worker)
        index = self._workers.index(worker)
        self._workers[index] = self._start()
        selector.register(_out(self._workers[index]), selectors.EVENT_READ, self._workers[index])


def _out(worker: _Worker) -> int:
    assert worker.process.stdout is not None
    return worker.process.stdout.fileno()


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue
