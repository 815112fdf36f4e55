"""Saves checkpoints of a run: weights, optimizer and progress, renamed into place when complete.

Megatron's `dist_checkpointing` format can be loaded under any parallel layout, including the distributed
optimizer's state.  Random numbers, prompt order and learning rate are functions of (seed, step), so
besides tensors the state is the step, the estimators' state (`extra`) and the recipe.  A manifest of
checksums is written last: a folder that lacks it or differs from it is damaged.
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

from opo_megatron import __version__
from opo_megatron.checkpoint.contents import model_of, optimizer_of, sharded_state, wrapped_errors
from opo_megatron.checkpoint.kept_rollouts import KeptRollouts
from opo_megatron.checkpoint.manifest import Entries, entries_of, write_manifest, written_by
from opo_megatron.checkpoint.progress import CONFIG_FILE, STATE_FILE, RunProgress
from opo_megatron.checkpoint.torch_dist import save_with
from opo_megatron.checkpoint.writer import AsyncWriter, PlannedFiles, SyncWriter, Writer, WriteResult
from opo_megatron.config import Config, to_yaml
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import SaveError
from opo_megatron.policy.policy import Policy
from opo_megatron.utils.start_folder import absolute

T = TypeVar("T")


class PendingCheckpoint:
    """A checkpoint of the current state being written to `<run.dir>/checkpoints/<progress>`."""

    def __init__(
        self,
        policy: Policy,
        config: Config,
        progress: RunProgress,
        extra: dict[str, Any] | None = None,
        in_background: bool = False,
        kept: KeptRollouts | None = None,
    ) -> None:
        """Snapshot the state and start writing; a collective of all ranks.

        Args:
            extra: the estimators' state, name → JSON value.
            in_background: write in a separate process while training continues.
            kept: rollouts that later steps train on, this rank's part; written before anything else.

        Raises:
            SaveError: on all ranks if one cannot write; earlier checkpoints are unchanged.
        """
        self.parallel, self.progress = policy.parallel, progress
        self.final = absolute(config.run.dir) / "checkpoints" / progress.folder
        self._partial = self.final.with_name(self.final.name + ".partial")
        state = _state_of(policy, config, progress) | {"extra": extra or {}}
        state_text = json.dumps(state, indent=2) + "\n"  # now, since `extra` changes later

        def texts() -> dict[str, str]:
            if self.parallel.rank > 0:
                return {}
            return {STATE_FILE: state_text, CONFIG_FILE: to_yaml(config)}  # to_yaml takes half a second

        self._kept = kept.gathered(self.parallel) if kept is not None else {}
        self._writer: Writer | None = None
        with self._removed_on_failure():
            _run_collectively(self.parallel, self.final, self._prepare_folder)
            with self._wrapped_errors(), _without_torch_checksums():
                save_with(self._plan, sharded_state(policy, is_loading=False), self._partial)
                self._writer = (AsyncWriter if in_background else SyncWriter)(self._files, texts)

    def is_written(self) -> bool:
        """Whether this rank's part is written, so that `complete` does not wait for it."""
        return self._writer is not None and self._writer.is_done()

    def complete(self) -> None:
        """Wait until everything is written and rename the checkpoint into place; a collective of all ranks.

        Raises:
            SaveError: as above.
        """
        assert self._writer is not None
        with self._removed_on_failure():
            with _without_torch_checksums():
                written = self._writer.wait()
            _run_collectively(self.parallel, self.final, lambda: _raise_if_failed(written))
            with self._wrapped_errors():
                self._files.finish(written.places)
            parts = _run_collectively(self.parallel, self.final, lambda: self._finish(written.entries))
            _run_collectively(self.parallel, self.final, lambda: self._publish(parts))

    def cancel(self) -> None:
        """Stop writing."""
        if self._writer is not None:
            self._writer.cancel()

    def _plan(self, state: dict[str, Any], folder: Path) -> None:
        self._files = PlannedFiles(state, folder, self.parallel)

    def _prepare_folder(self) -> None:
        if self.parallel.rank == 0:
            for partial in self.final.parent.glob("*.partial"):  # left by killed attempts
                shutil.rmtree(partial)
            self._partial.mkdir(parents=True)
            for name, rollouts in self._kept.items():
                assert rollouts is not None
                rollouts.save(self._partial / name)
            self._kept = {}

    def _finish(self, entries: Entries) -> Entries:
        """The entries of all files that this rank wrote, including Megatron's metadata."""
        own = written_by(self._partial, self.parallel.rank, self.parallel.world_size)
        return entries | entries_of(self._partial, [name for name in own if name not in entries])

    def _publish(self, parts: list[Entries]) -> None:
        if self.parallel.rank == 0:
            write_manifest(self._partial, {name: entry for part in parts for name, entry in part.items()})
            os.replace(self._partial, self.final)

    def _wrapped_errors(self) -> AbstractContextManager[None]:
        return wrapped_errors(f"the checkpoint {self.final} cannot be written", "free disk space", SaveError)

    @contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except SaveError:
            self.cancel()
            if self.parallel.rank == 0:  # a partial checkpoint would fill the disk
                shutil.rmtree(self._partial, ignore_errors=True)
            raise


def save(policy: Policy, config: Config, progress: RunProgress, extra: dict[str, Any] | None = None) -> None:
    """Write `<run.dir>/checkpoints/<progress>` and wait for it; a collective of all ranks."""
    PendingCheckpoint(policy, config, progress, extra).complete()


def _raise_if_failed(written: WriteResult) -> None:
    if written.error is not None:
        raise written.error


def _run_collectively(parallel: Parallel, final: Path, work: Callable[[], T]) -> list[T]:
    """Run `work` on all ranks; returns all results in rank order, or raises SaveError on all ranks."""
    result, failure = None, None
    try:
        result = work()
    except OSError as error:
        failure = str(error)
    gathered = all_gather_objects(parallel, (result, failure))
    for _, reason in gathered:
        if reason is not None:
            raise SaveError(f"the checkpoint {final} cannot be written ({reason}); free disk space")
    return [value for value, _ in gathered]


@contextmanager
def _without_torch_checksums() -> Iterator[None]:
    """Disable torch's checksums, which cost as much as writing and are not verified at loading."""
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
