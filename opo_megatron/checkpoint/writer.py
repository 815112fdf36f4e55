"""Writes this rank's part of a checkpoint, synchronously or in a background process.

Saving has three stages, each by the public stages of `torch.distributed.checkpoint`:

    plan      all ranks agree who writes what; tensors of a GPU are copied to the host
    write     each rank writes its file and reads it back for the checksums, here or in a forked process
    finish    rank 0 writes where everything lies

A forked process has a snapshot of memory: pages that training overwrites are copied by the kernel, so CPU
tensors need no explicit copy.  It dies with its rank.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem

from opo_megatron.checkpoint.manifest import Entries, entries_of, written_by
from opo_megatron.distributed.launch import die_with_parent
from opo_megatron.distributed.process_groups import Parallel

NICENESS = 10
"""Gives training priority if there are more processes than cores."""


class PlannedFiles:
    """The files of a checkpoint that are planned, and this rank's part of them."""

    def __init__(self, state: dict[str, Any], folder: Path, parallel: Parallel) -> None:
        """Plan; a collective of all ranks.

        Args:
            state: of `torch_dist.save_with`.
        """
        self.folder, self.parallel = folder, parallel
        self._planner = _HostPlanner(flatten_state_dict=False)
        # One thread: an error of another would be lost.  Nothing to copy ahead: all is on the host.
        self._storage = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
        is_first = parallel.rank == 0
        self._planner.set_up_planner(state, is_coordinator=is_first)
        self._storage.set_up_storage_writer(is_first)
        self._metadata: Any = None
        self._plan = self._agree(self._storage.prepare_local_plan(self._planner.create_local_plan()))
        self._planner.copy_to_host(self._plan)

    def _agree(self, local: SavePlan) -> SavePlan:
        plans = self._gather(local)
        if plans is not None:
            plans, self._metadata = self._planner.create_global_plan(plans)
            plans = self._storage.prepare_global_plan(plans)
        own: list[SavePlan] = [local]
        dist.scatter_object_list(own, plans, 0, self.parallel.cpu_group)
        return self._planner.finish_plan(own[0])

    def _gather(self, value: Any) -> list[Any] | None:
        """`value` of every rank, on rank 0."""
        gathered = [None] * self.parallel.world_size if self.parallel.rank == 0 else None
        dist.gather_object(value, gathered, 0, self.parallel.cpu_group)
        return gathered

    def write(self) -> list[Any]:
        """Write this rank's file; returns where its tensors lie."""
        places: list[Any] = self._storage.write_data(self._plan, self._planner).wait()
        return places

    def finish(self, places: list[Any]) -> None:
        """Write the places of all ranks' tensors; a collective of all ranks."""
        gathered = self._gather(places)
        if gathered is not None:
            self._storage.finish(self._metadata, gathered)


class _HostPlanner(MCoreSavePlanner):  # type: ignore[misc]
    """Megatron's planner, with copies on the host of a GPU's tensors, which a forked process cannot read."""

    def copy_to_host(self, plan: SavePlan) -> None:
        self._copies: dict[MetadataIndex, Tensor] = {}
        copies = {}
        for item in plan.items:
            data = self.resolve_data(item)
            if isinstance(data, Tensor) and not data.is_cpu:
                copies[item.index] = data.detach().to("cpu", non_blocking=True)
        if copies:
            torch.cuda.synchronize()
        self._copies = copies

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return self._copies.get(write_item.index, object)


class WriteResult(NamedTuple):
    """The outcome on one rank."""

    places: list[Any]
    """Where its tensors lie."""
    entries: Entries
    error: OSError | None = None


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

    def __init__(self, files: PlannedFiles, texts: Texts) -> None:
        self._written = _write(files, texts)

    def is_done(self) -> bool:
        return True

    def wait(self) -> WriteResult:
        return self._written

    def cancel(self) -> None: ...


class AsyncWriter:
    """Writes in a background process."""

    def __init__(self, files: PlannedFiles, texts: Texts) -> None:
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_write_and_send, args=(die_with_parent(), sender, files, texts), name="checkpoint writer"
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
            error = OSError(f"its writer process ended with code {self._process.exitcode}")
            return WriteResult([], {}, error)
        self._process.join()
        return written

    def cancel(self) -> None:
        self._process.kill()
        self._process.join()


def _write(files: PlannedFiles, texts: Texts) -> WriteResult:
    folder, parallel = files.folder, files.parallel
    try:
        places = files.write()
        for name, text in texts().items():
            (folder / name).write_text(text)
        own = written_by(folder, parallel.rank, parallel.world_size)
        return WriteResult(places, entries_of(folder, own))
    except OSError as error:
        return WriteResult([], {}, error)
    except RuntimeError as error:  # torch.save hides the error of a stream in one of these
        return WriteResult([], {}, OSError(f"RuntimeError: {str(error).partition(chr(10))[0]}"))


def _write_and_send(on_start: Any, sender: Connection, files: PlannedFiles, texts: Texts) -> None:
    if on_start is not None:
        on_start()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # the rank handles these
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    torch.set_num_threads(1)  # threads of the rank's OpenMP pool do not exist here
    sender.send(_write(files, texts))
