"""The trainer's side of the processes that environments live in: questions out, replies in, no waiting.

A conversation gets a process with its first question, and gives it back when it has ended; up to `count`
have one at the same time, and the others wait in order.  A process that is killed takes its one
conversation along, and no other.  Its time limit runs from when the question is sent until the reply can be
read, and a reply that is there counts, however long nobody looked.

A process is as alive as its socket: closing it here ends the environment and all that it started
(`environment_worker.py`), also when the trainer itself is killed.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.stray_processes import MARK, kill_marked
from opo_megatron.utils.secrets import without_secrets
from opo_megatron.utils.start_folder import start_folder

START_SECONDS = 120.0
"""Time limit of the imports."""
LONGEST_REPLY = 2**24
"""Bytes."""


class Reply(NamedTuple):
    """What an environment said to the last question about `key`."""

    key: Hashable
    kind: str
    """`given`, `reward`, `wrong` (a mistake that ends the run) or `failed`."""
    value: Any


@dataclass
class _Process:
    """One end of a socket; the other is an environment's process."""

    connection: socket.socket
    key: Hashable = None
    deadline: float = float("inf")
    received: bytes = b""


@dataclass
class EnvironmentPool:
    """Ask about conversations by key; `replies` brings one reply for each question."""

    config: TaskConfig
    count: int
    """Processes at the same time."""
    source: str | None = None
    """Hash of the file of a user's class."""
    _parent: subprocess.Popen[bytes] | None = None
    _control: socket.socket | None = None
    _processes: dict[Hashable, _Process] = field(default_factory=dict)
    _idle: list[_Process] = field(default_factory=list)
    _waiting: deque[tuple[Hashable, list[Any]]] = field(default_factory=deque)
    _replies: list[Reply] = field(default_factory=list)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _mark: str = field(default_factory=lambda: f"{os.getpid()}-{time.monotonic_ns()}")

    def start(self) -> None:
        """Load the environment's class, in a process from which the others are forked.

        Raises:
            UserError: where it cannot be loaded.
        """
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "opo_megatron.tasks.environment_worker"]
        variables = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", MARK: self._mark}
        self._control = ours
        self._parent = subprocess.Popen(
            [*command, json.dumps(asdict(self.config))],
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE,
            env=without_secrets(os.environ) | variables,
            cwd=start_folder(),
            start_new_session=True,
        )
        theirs.close()
        message = self._first_line(self._parent)
        if "ready" not in message:
            self.close()
            raise UserError(message["failed"])
        self.source = message["ready"]

    def _first_line(self, parent: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert parent.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(parent.stdout, selectors.EVENT_READ)
            is_ready = selector.select(START_SECONDS)
        line = parent.stdout.readline() if is_ready else b""
        try:
            return dict(json.loads(line))
        except ValueError:
            what = "ended before it was ready (its error is above)" if is_ready else "did not start in time"
            words = f"the process of task.environment={self.config.environment} {what}; check its module"
            return {"failed": words}

    def begin(self, key: Hashable, prompt: Prompt, tokens: list[int]) -> None:
        """Start an environment and give it the policy's first turn; the reply is `given`."""
        self._waiting.append((key, ["begin", asdict(prompt.unopened), prompt.tokens, tokens]))
        self._send_waiting()

    def respond(self, key: Hashable, tokens: list[int]) -> None:
        """Give it another turn; the reply is `given`."""
        self._send(self._processes[key], ["respond", tokens])

    def reward(self, key: Hashable) -> None:
        """Ask for its reward."""
        self._send(self._processes[key], ["reward"])

    def release(self, key: Hashable) -> None:
        """The conversation has ended; its process may hold another one."""
        process = self._processes.pop(key, None)
        if process is not None:
            process.key = None
            self._idle.append(process)
            self._send_waiting()

    def forget(self, key: Hashable) -> None:
        """Drop the conversation with its process, and any reply."""
        process = self._processes.pop(key, None)
        if process is not None:
            self._end(process)
        self._waiting = deque(one for one in self._waiting if one[0] != key)
        self._replies = [one for one in self._replies if one.key != key]

    def replies(self, timeout: float) -> list[Reply]:
        """What has been replied since the last call; waits at most `timeout` seconds for the first one."""
        end = time.monotonic() + timeout
        while True:
            nearest = min((one.deadline for one in self._processes.values()), default=float("inf"))
            wait = 0.0 if self._replies else max(0.0, min(end, nearest) - time.monotonic())
            for key, _ in self._selector.select(wait):
                self._receive(key.data)
            now = time.monotonic()
            for process in [one for one in self._processes.values() if now >= one.deadline]:
                self._fail(process, f"took longer than task.environment_seconds={self._seconds:g}")
            if self._replies or now >= end:
                found, self._replies = self._replies, []
                return found

    def close(self) -> None:
        """End all processes, and what they started."""
        for process in [*self._processes.values(), *self._idle]:
            self._end(process)
        self._processes, self._idle, self._replies = {}, [], []
        self._waiting.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._parent is not None:
            try:
                self._parent.wait(2.0)
            except subprocess.TimeoutExpired:
                self._parent.kill()
                self._parent.wait()
            if self._parent.stdout is not None:
                self._parent.stdout.close()
            self._parent = None
            kill_marked(self._mark)

    # ------------------------------------------------------------------ processes

    @property
    def _seconds(self) -> float:
        return self.config.environment_seconds

    def _send_waiting(self) -> None:
        while self._waiting and len(self._processes) < self.count:
            key, question = self._waiting.popleft()
            process = self._idle.pop() if self._idle else self._fork()
            process.key = key
            self._processes[key] = process
            self._send(process, question)

    def _fork(self) -> _Process:
        """A new process; the one that forks is started again where something has killed it."""
        for _ in range(2):
            if self._control is None:
                self.start()
            assert self._control is not None
            ours, theirs = socket.socketpair()
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
            except OSError:
                ours.close()
                self._control = None
                continue
            finally:
                theirs.close()
            process = _Process(ours)
            self._selector.register(ours, selectors.EVENT_READ, process)
            return process
        raise UserError(
            f"the process of task.environment={self.config.environment} ended twice; see its errors above"
        )

    def _send(self, process: _Process, question: list[Any]) -> None:
        process.deadline = time.monotonic() + self._seconds
        with suppress(OSError):  # `_receive` notices that the process has ended
            process.connection.sendall(json.dumps(question).encode() + b"\n")

    def _receive(self, process: _Process) -> None:
        try:
            part = process.connection.recv(2**20)
        except OSError:
            part = b""
        process.received += part
        if not part or len(process.received) > LONGEST_REPLY:
            self._fail(process, "ended its process" if not part else "gave too many tokens")
            return
        line, newline, rest = process.received.partition(b"\n")
        if not newline:
            return
        process.received = rest
        try:
            kind, value = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            kind, value = "failed", "wrote into the socket of its replies"
        process.deadline = float("inf")
        if kind == "failed":
            self._fail(process, str(value))
        elif process.key is not None:
            self._replies.append(Reply(process.key, kind, value))

    def _fail(self, process: _Process, words: str) -> None:
        """The conversation has failed; its process is ended, because its state is unknown."""
        self._end(process)
        if process in self._idle:
            self._idle.remove(process)
        if process.key is not None:
            del self._processes[process.key]
            self._replies.append(Reply(process.key, "failed", words))
        self._send_waiting()

    def _end(self, process: _Process) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(process.connection)
        process.connection.close()
