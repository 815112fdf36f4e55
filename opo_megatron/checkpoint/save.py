"""Checkpoints of a run: weights, optimizer and progress, visible under their name only when complete.

Megatron's `dist_checkpointing` writes them so that any parallel layout can read them back, the
distributed optimizer's state included.  Random numbers, prompt order and learning rate are functions
of (seed, step), so besides the tensors the state is the step, what estimators remember (`extra`) and
the recipe.  A manifest of checksums is written last: a folder without it, or that differs from it, is
damaged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing

from opo_megatron import __version__
from opo_megatron.checkpoint.contents import model_of, named_failures, optimizer_of, sharded_state
from opo_megatron.checkpoint.manifest import Entries, entries_of, write_manifest, written_by
from opo_megatron.checkpoint.progress import CONFIG_FILE, STATE_FILE, RunProgress
from opo_megatron.checkpoint.writer import (
    AsyncWriter,
    SyncWriter,
    Writer,
    Written,
    give_results_to_megatron,
    keep_results_in_memory,
)
from opo_megatron.config import Config, to_yaml
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import SaveError
from opo_megatron.policy.policy import Policy

T = TypeVar("T")

keep_results_in_memory()


class PendingCheckpoint:
    """A checkpoint on its way to `<run.dir>/checkpoints/<progress>`, of the state of this moment."""

    def __init__(
        self,
        policy: Policy,
        config: Config,
        progress: RunProgress,
        extra: dict[str, Any] | None = None,
        in_background: bool = False,
    ) -> None:
        """Take the state and begin; a collective of all ranks.

        Args:
            extra: what estimators remember, name → JSON value.
            in_background: write in a process of its own while training goes on.

        Raises:
            SaveError: on all ranks where one cannot write; what was there before stays as it is.
        """
        self.parallel, self.progress = policy.parallel, progress
        self.final = Path(config.run.dir) / "checkpoints" / progress.folder
        self._partial = self.final.with_name(self.final.name + ".partial")
        state = _state_of(policy, config, progress) | {"extra": extra or {}}
        state_text = json.dumps(state, indent=2) + "\n"  # now: `extra` goes on

        def texts() -> dict[str, str]:
            if self.parallel.rank > 0:
                return {}
            return {STATE_FILE: state_text, CONFIG_FILE: to_yaml(config)}  # which takes half a second

        self._writer: Writer | None = None
        with self._removed_if_it_fails():
            _together(self.parallel, self.final, self._make_room)
            with self._failures_named(), _without_checksums_of_torch():
                self._request = dist_checkpointing.save(
                    sharded_state(policy, is_loading=False), str(self._partial), async_sharded_save=True
                )
                writer = AsyncWriter if in_background else SyncWriter
                place = (self._partial, self.parallel.rank, self.parallel.world_size)
                self._writer = writer(self._request, texts, *place)

    def is_written(self) -> bool:
        """Whether this rank's part is, so that `complete` takes no time."""
        return self._writer is not None and self._writer.is_done()

    def complete(self) -> None:
        """Wait until all is written, and give the checkpoint its name; a collective of all ranks.

        Raises:
            SaveError: as above.
        """
        assert self._writer is not None
        with self._removed_if_it_fails():
            with _without_checksums_of_torch():
                written = self._writer.wait()
            _together(self.parallel, self.final, lambda: _raise_if_failed(written))
            with self._failures_named():
                give_results_to_megatron(written)
                for finalize in self._request.finalize_fns:
                    finalize()
            parts = _together(self.parallel, self.final, lambda: self._finish(written.entries))
            _together(self.parallel, self.final, lambda: self._name(parts))

    def cancel(self) -> None:
        """Give it up."""
        if self._writer is not None:
            self._writer.cancel()

    def _make_room(self) -> None:
        if self.parallel.rank == 0:
            for partial in self.final.parent.glob("*.partial"):  # left by attempts that were killed
                shutil.rmtree(partial)
            self._partial.mkdir(parents=True)

    def _finish(self, entries: Entries) -> Entries:
        """The entries of all that this rank has written, Megatron's metadata included."""
        own = written_by(self._partial, self.parallel.rank, self.parallel.world_size)
        return entries | entries_of(self._partial, [name for name in own if name not in entries])

    def _name(self, parts: list[Entries]) -> None:
        if self.parallel.rank == 0:
            write_manifest(self._partial, {name: entry for part in parts for name, entry in part.items()})
            os.replace(self._partial, self.final)

    def _failures_named(self) -> AbstractContextManager[None]:
        return named_failures(
            f"the checkpoint {self.final} cannot be written", "give the disk space", SaveError
        )

    @contextmanager
    def _removed_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except SaveError:
            self.cancel()
            if self.parallel.rank == 0:  # what there is of it would fill the disk
                shutil.rmtree(self._partial, ignore_errors=True)
            raise


def save(policy: Policy, config: Config, progress: RunProgress, extra: dict[str, Any] | None = None) -> None:
    """Write `<run.dir>/checkpoints/<progress>` and wait for it; a collective of all ranks."""
    PendingCheckpoint(policy, config, progress, extra).complete()


def _raise_if_failed(written: Written) -> None:
    """What Megatron would not be told of where a rank has no tensors to write."""
    if isinstance(written.results, OSError):
        raise written.results


def _together(parallel: Parallel, final: Path, work: Callable[[], T]) -> list[T]:
    """What each rank's `work` returns, by rank; where one cannot write, all are told."""
    result, failure = None, None
    try:
        result = work()
    except OSError as error:
        failure = str(error)
    gathered = all_gather_objects(parallel, (result, failure))
    for _, reason in gathered:
        if reason is not None:
            raise SaveError(f"the checkpoint {final} cannot be written ({reason}); give the disk space")
    return [value for value, _ in gathered]


@contextmanager
def _without_checksums_of_torch() -> Iterator[None]:
    """They cost as much as writing, are not asked for when loading, and the manifest has its own."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _state_of(policy: Policy, config: Config, progress: RunProgress) -> dict[str, Any]:
    return {
        "progress": asdict(progress),
        "version": policy.version,
        "model": model_of(policy, config),
        "optimizer": optimizer_of(config),
        "versions": {"opo_megatron": __version__, "torch": torch.__version__},
    }
