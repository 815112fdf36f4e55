"""Writes this rank's part of a checkpoint, here and now or in a process beside the training.

A forked process has the memory of this moment: what the training overwrites later is copied by the
kernel, page by page, so tensors on a CPU need no copy of their own.  Those on a GPU are copied to the
host before.  The process writes, reads back for the checksums, and dies with its rank; so do the processes
in which Megatron writes, which would wait for ever for a queue that was torn.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from opo_megatron.checkpoint.manifest import Entries, entries_of, written_by
from opo_megatron.distributed.launch import die_with_parent

NICENESS = 10
"""Training goes first where there are more processes than cores."""


_bind_forked: Callable[[], None] | None = None
"""What a process that is forked now does first."""


def _forked() -> None:
    if _bind_forked is not None:
        _bind_forked()


os.register_at_fork(after_in_child=_forked)


@contextmanager
def _forks_die_with_this_process() -> Iterator[None]:
    global _bind_forked
    _bind_forked = die_with_parent()
    try:
        yield
    finally:
        _bind_forked = None


class Written(NamedTuple):
    """What one rank has written."""

    results: Any
    """For Megatron's metadata; an Exception where it failed, None where there was nothing to write."""
    entries: Entries


Texts = Callable[[], dict[str, str]]
"""Small files that this rank writes besides, by name."""


class Writer(Protocol):
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> Written: ...

    def cancel(self) -> None: ...


class SyncWriter:
    """Has written when it is made."""

    def __init__(self, request: AsyncRequest, texts: Texts, folder: Path, rank: int, world_size: int) -> None:
        self._written = _write(request, _on_host(request), texts, folder, rank, world_size)

    def is_done(self) -> bool:
        return True

    def wait(self) -> Written:
        return self._written

    def cancel(self) -> None: ...


class AsyncWriter:
    """A process that has begun to write."""

    def __init__(self, request: AsyncRequest, texts: Texts, folder: Path, rank: int, world_size: int) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        arguments = (request, _on_host(request), texts, folder, rank, world_size)
        self._process = context.Process(
            target=_write_and_send, args=(die_with_parent(), sender, *arguments), name="checkpoint writer"
        )
        self._process.start()
        sender.close()

    def is_done(self) -> bool:
        return self._receiver.poll()

    def wait(self) -> Written:
        try:
            written: Written = self._receiver.recv()
        except EOFError:
            self._process.join()
            error = RuntimeError(f"the process that writes it ended with code {self._process.exitcode}")
            return Written(error, {})
        self._process.join()
        return written

    def cancel(self) -> None:
        self._process.kill()
        self._process.join()


def keep_results_in_memory() -> None:
    """Megatron's queue of write results is served by a process that outlives a rank that is killed, and
    keeps its pipes open.  Results come by a pipe here, or from the same process, so memory is enough."""
    filesystem_async._results_queue = SimpleQueue()


def give_results_to_megatron(written: Written) -> None:
    """Give Megatron the results that it will ask for."""
    if written.results is not None:
        filesystem_async._results_queue.put(written.results)


def _on_host(request: AsyncRequest) -> Any:
    return request.preload_fn() if request.async_fn is not None else None


def _write(
    request: AsyncRequest, buckets: Any, texts: Texts, folder: Path, rank: int, world_size: int
) -> Written:
    results = None
    if request.async_fn is not None:
        found: SimpleQueue[Any] = SimpleQueue()
        with _forks_die_with_this_process():
            request.async_fn(request.async_fn_args[0], buckets, found)
        results = found.get_nowait()
    if isinstance(results, Exception):
        return Written(results, {})
    try:
        for name, text in texts().items():
            (folder / name).write_text(text)
        return Written(results, entries_of(folder, written_by(folder, rank, world_size)))
    except OSError as error:
        return Written(error, {})


def _write_and_send(bind: Any, sender: Connection, *arguments: Any) -> None:
    if bind is not None:
        bind()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # they are the rank's to answer
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    sender.send(_write(*arguments))
