"""Worker processes for grading, which may hang, crash or use too much memory without harming the run.

Each worker is `python -m opo_megatron.tasks.grading_worker`, and gets a few jobs at a time.  A job that
takes too long, or whose worker dies, has no result; the worker is killed with all that it started, and
replaced, because an interrupted library is in an unknown state.  The jobs behind it are graded by others.
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
from pathlib import Path

from opo_megatron.errors import UserError
from opo_megatron.tasks.stray_processes import MARK, kill_marked, kill_worker
from opo_megatron.utils.secrets import without_secrets
from opo_megatron.utils.start_folder import start_folder

START_SECONDS = 120.0
"""Time limit of a worker's imports."""
GRACE_SECONDS = 1.0
"""What a worker that times its jobs itself gets in addition."""
MOST_FAILED_STARTS = 3
"""In a row, of workers that are replaced."""
UNKNOWN = "not known before a worker is ready"

Job = Sequence[str]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    started: float
    mode: str | None = None
    """How it calls the grader (`user_verifier.py`); None until it is ready."""
    jobs: list[int] = field(default_factory=list)
    """Indices of the jobs that it was sent last."""
    open: set[int] = field(default_factory=set)
    """Positions in `jobs` of those without a reply."""
    deadline: float = 0.0
    received: bytes = b""


@dataclass
class WorkerPool:
    """`grade` returns rewards in order; workers start with it, or with `start`, and run until `close`."""

    count: int
    seconds: float
    """Time limit of a job."""
    memory_mib: int
    """Limit of a worker's address space; 0 is none."""
    batch: int = 64
    """Jobs that a worker gets at once, at most."""
    grader: str = "math"
    """`math`, `math_strict` or `package.module:function`."""
    timeouts: int = 0
    crashes: int = 0
    source: str | None = UNKNOWN
    """Hash of the file of a user's function."""
    _failed_starts: int = 0
    _workers: list[_Worker] = field(default_factory=list)
    _mark: str = field(default_factory=lambda: f"{os.getpid()}-{time.monotonic_ns()}")
    _folder: Path = field(default_factory=start_folder)

    def start(self) -> None:
        """Start the workers, and wait until one is ready.

        Raises:
            UserError: where the grader cannot be loaded.
        """
        self._run(_Batch([], is_start=True))

    def grade(self, jobs: Sequence[Job]) -> list[float | None]:
        """Reward of each job, which is the grader's arguments; None where it timed out or its worker died.

        Raises:
            UserError: where workers cannot start, or the grader raises or returns no number.
        """
        batch = _Batch(jobs)
        self._run(batch)
        return batch.results

    def close(self) -> None:
        """Kill all workers, and what they started."""
        for worker in self._workers:
            kill_worker(worker.process)
        if self.crashes:  # a guardian that was killed could not clean up
            kill_marked(self._mark)
        self._workers = []

    def _run(self, batch: _Batch) -> None:
        selector = selectors.DefaultSelector()
        self._replace_dead_workers()
        for worker in self._workers:
            selector.register(_out(worker), selectors.EVENT_READ, worker)
        try:
            while not batch.is_done(self._workers):
                for worker in self._workers:
                    if worker.mode is not None and not worker.open and batch.waiting:
                        self._send(worker, batch)
                nearest = min(self._deadline(worker) for worker in self._workers)
                for key, _ in selector.select(max(0.0, nearest - time.monotonic())):
                    if not self._receive(key.data, batch):
                        self._crashed(key.data, batch, selector)
                for worker in [w for w in self._workers if time.monotonic() >= self._deadline(w)]:
                    if worker.mode is None:
                        raise UserError(
                            f"a worker of task.verifier={self.grader} did not start within "
                            f"{START_SECONDS:.0f} seconds; see what its module does when it is imported"
                        )
                    self.timeouts += batch.give_up(worker)
                    self._replace(worker, selector)
        except BaseException:
            self.close()  # a worker in the middle of a job would reply to the next call
            raise
        finally:
            selector.close()

    def _replace_dead_workers(self) -> None:
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            kill_worker(worker.process)
            self._workers.remove(worker)
        while len(self._workers) < self.count:
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        command = [sys.executable, "-m", "opo_megatron.tasks.grading_worker"]
        command += [self.grader, str(self.seconds), str(self.memory_mib)]
        environment = without_secrets(os.environ) | {"OMP_NUM_THREADS": "1", MARK: self._mark}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=self._folder,
            start_new_session=True,
        )
        return _Worker(process, time.monotonic())

    def _deadline(self, worker: _Worker) -> float:
        if worker.mode is None:
            return worker.started + START_SECONDS
        return worker.deadline if worker.open else float("inf")

    def _send(self, worker: _Worker, batch: _Batch) -> None:
        worker.jobs = batch.take(self.batch, self.count, worker.mode)
        worker.open = set(range(len(worker.jobs)))
        self._extend(worker)
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(
                json.dumps([batch.jobs[index] for index in worker.jobs]).encode() + b"\n"
            )
            worker.process.stdin.flush()
        except BrokenPipeError:
            return  # `_receive` notices that the worker has ended

    def _extend(self, worker: _Worker) -> None:
        """Set the deadline: of the next reply, of a batch, or of jobs that run at the same time."""
        limit = {
            "each": self.seconds,
            "batch": self.seconds * len(worker.jobs),
            "async": self.seconds + GRACE_SECONDS,
        }[worker.mode or "each"]
        worker.deadline = time.monotonic() + limit

    def _receive(self, worker: _Worker, batch: _Batch) -> bool:
        """Read a worker's replies; False where it has ended."""
        part = os.read(_out(worker), 2**20)
        worker.received += part
        *lines, worker.received = worker.received.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                if worker.mode is None:
                    worker.mode = self._checked_start(*message)
                    continue
                position, reply = message
                index = worker.jobs[position]
            except (ValueError, TypeError, IndexError, KeyError, RecursionError):
                return False  # the grader wrote into the descriptor of the replies
            worker.open.discard(position)
            if isinstance(reply, dict):
                raise verifier_error(self.grader, reply["error"], batch.jobs[index])
            batch.results[index] = reply
            if worker.mode == "each":
                self._extend(worker)
        return bool(part)

    def _checked_start(self, message: dict[str, str]) -> str:
        """How the grader is called."""
        if "failed" in message:
            raise UserError(
                f"task.verifier={self.grader} cannot be loaded: {message['failed']}; check the name; modules "
                f"are searched in {self._folder} and on PYTHONPATH"
            )
        self.source = message["source"]
        return message["mode"]

    def _crashed(self, worker: _Worker, batch: _Batch, selector: selectors.BaseSelector) -> None:
        """Replace a worker; one that died in its first start, or several in a row, would die again."""
        self._failed_starts = self._failed_starts + 1 if worker.mode is None else 0
        if worker.mode is None and (self.source is UNKNOWN or self._failed_starts > MOST_FAILED_STARTS):
            kill_worker(worker.process)  # it may be alive, and have written into the replies
            code = worker.process.returncode
            raise UserError(
                f"a worker of task.verifier={self.grader} ended with code {code} before its first reply (its "
                "error is above); check the verifier's module, and task.verifier_memory_mib"
            )
        self.crashes += batch.give_up(worker)
        self._replace(worker, selector)

    def _replace(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(_out(worker))
        if not kill_worker(worker.process):
            kill_marked(self._mark, but=[other.process.pid for other in self._workers if other is not worker])
        index = self._workers.index(worker)
        self._workers[index] = self._start()
        selector.register(_out(self._workers[index]), selectors.EVENT_READ, self._workers[index])


class _Batch:
    """The jobs of one call."""

    def __init__(self, jobs: Sequence[Job], is_start: bool = False) -> None:
        self.jobs, self._is_start = jobs, is_start
        self.results: list[float | None] = [None] * len(jobs)
        self.waiting: deque[list[int]] = deque([list(range(len(jobs)))] if jobs else [])
        """Groups of jobs; a group that failed together is waiting as single jobs."""

    def is_done(self, workers: Sequence[_Worker]) -> bool:
        if self._is_start:
            return any(worker.mode is not None for worker in workers)
        return not self.waiting and not any(worker.open for worker in workers)

    def take(self, most: int, workers: int, mode: str | None) -> list[int]:
        """The next jobs for one worker: few enough that all have work until the end."""
        group = self.waiting.popleft()
        left = len(group) + sum(map(len, self.waiting))
        size = min(len(group), most, -(-left // (workers if mode == "batch" else 2 * workers)))
        if size < len(group):
            self.waiting.appendleft(group[size:])
        return group[:size]

    def give_up(self, worker: _Worker) -> int:
        """Return what a failed worker has not graded; the number of jobs that get no result.

        A worker that grades one by one failed at the first of them, and the others wait again.  Of jobs that
        were graded together each is tried alone."""
        left = [worker.jobs[position] for position in sorted(worker.open)]
        worker.open = set()
        if worker.mode == "each" or len(left) == 1:
            if left[1:]:
                self.waiting.appendleft(left[1:])
            return min(1, len(left))
        self.waiting.extendleft([index] for index in reversed(left))
        return 0


def verifier_error(name: str, words: str, job: Job) -> UserError:
    """The sentence about a mistake of a verifier with a job, whose last arguments are response and answer."""
    response, answer = job[-2:]
    return UserError(
        f"the verifier {name} {words} for the answer {answer[:60]!r} and the response {response[:60]!r}; it "
        "must return a finite number for any text"
    )


def _out(worker: _Worker) -> int:
    assert worker.process.stdout is not None
    return worker.process.stdout.fileno()
