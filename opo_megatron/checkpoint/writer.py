"""Writes this rank's part of a checkpoint, synchronously or in a background process.

A forked process has a snapshot of memory: pages that training overwrites are copied by the kernel, so CPU
tensors need no explicit copy.  GPU tensors are copied to the host first.  The process writes, reads back
for the checksums, and dies with its rank; so do Megatron's writer processes, which would wait forever for a
broken queue.
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
"""Gives training priority if there are more processes than cores."""


_on_fork: Callable[[], None] | None = None
"""Called first in a newly forked process."""


def _call_on_fork() -> None:
    if _on_fork is not None:
        _on_fork()


os.register_at_fork(after_in_child=_call_on_fork)


@contextmanager
def _forks_die_with_this_process() -> Iterator[None]:
    global _on_fork
    _on_fork = die_with_parent()
    try:
        yield
    finally:
        _on_fork = None


class WriteResult(NamedTuple):
    """The outcome on one rank."""

    results: Any
    """For Megatron's metadata; an Exception if writing failed, None if there was nothing to write."""
    entries: Entries


Texts = Callable[[], dict[str, str]]
"""Returns additional small text files of this rank, name → content."""


class Writer(Protocol):
    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> WriteResult: ...

    def cancel(self) -> None: ...


class SyncWriter:
    """Writes in its constructor."""

    def __init__(self, request: AsyncRequest, texts: Texts, folder: Path, rank: int, world_size: int) -> None:
        self._written = _write(request, _on_host(request), texts, folder, rank, world_size)

    def is_done(self) -> bool:
        return True

    def wait(self) -> WriteResult:
        return self._written

    def cancel(self) -> None: ...


class AsyncWriter:
    """Writes in a background process."""

    def __init__(self, request: AsyncRequest, texts: Texts, folder: Path, rank: int, world_size: int) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        args = (request, _on_host(request), texts, folder, rank, world_size)
        self._process = context.Process(
            target=_write_and_send, args=(die_with_parent(), sender, *args), name="checkpoint writer"
        )
        self._process.start()
        sender.close()

    def is_done(self) -> bool:
        return self._receiver.poll()

    def wait(self) -> WriteResult:
        try:
            written: WriteResult = self._receiver.recv()
        except EOFError:
            self._process.join()
            error = RuntimeError(f"its writer process ended with code {self._process.exitcode}")
            return WriteResult(error, {})
        self._process.join()
        return written

    def cancel(self) -> None:
        self._process.kill()
        self._process.join()


def keep_results_in_memory() -> None:
    """Replace Megatron's queue of write results by one in memory.

    Megatron's is served by a process that outlives a killed rank and keeps its pipes open.  Here results
    come from this process or through a pipe.
    """
    filesystem_async._results_queue = SimpleQueue()


def give_results_to_megatron(written: WriteResult) -> None:
    """Put the results where Megatron reads them."""
    if written.results is not None:
        filesystem_async._results_queue.put(written.results)


def _on_host(request: AsyncRequest) -> Any:
    return request.preload_fn() if request.async_fn is not None else None


def _write(
    request: AsyncRequest, buckets: Any, texts: Texts, folder: Path, rank: int, world_size: int
) -> WriteResult:
    results = None
    if request.async_fn is not None:
        queue: SimpleQueue[Any] = SimpleQueue()
        with _forks_die_with_this_process():
            request.async_fn(request.async_fn_args[0], buckets, queue)
        results = queue.get_nowait()
    if isinstance(results, Exception):
        return WriteResult(results, {})
    try:
        for name, text in texts().items():
            (folder / name).write_text(text)
        return WriteResult(results, entries_of(folder, written_by(folder, rank, world_size)))
    except OSError as error:
        return WriteResult(error, {})


def _write_and_send(on_start: Any, sender: Connection, *args: Any) -> None:
    if on_start is not None:
        on_start()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # the rank handles these
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    sender.send(_write(*args))
