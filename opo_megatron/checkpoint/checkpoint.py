"""Checkpoints of a run: weights, optimizer and progress, visible under their name only when complete.

Megatron's `dist_checkpointing` writes them so that any parallel layout can read them back, the
distributed optimizer's state included.  Random numbers, prompt order and learning rate are functions
of (seed, step), so besides the tensors the state is the step, what estimators remember (`extra`) and
the recipe.  A manifest of checksums is written last: a folder without it, or that differs from it, is
damaged.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from opo_megatron import __version__
from opo_megatron.checkpoint.manifest import (
    Entries,
    entries_of,
    find_damage,
    read_manifest,
    share_to_check,
    write_manifest,
    written_by,
)
from opo_megatron.checkpoint.optimizer_state import gather_leanly
from opo_megatron.checkpoint.writer import (
    AsyncWriter,
    SyncWriter,
    Writer,
    Written,
    hand_over,
    keep_results_in_memory,
)
from opo_megatron.config import Config, to_yaml
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import SaveError, UserError
from opo_megatron.policy.policy import Policy

STATE_FILE = "run_state.json"
CONFIG_FILE = "config.yaml"
"""The recipe, resolved, of the run that wrote the checkpoint."""
T = TypeVar("T")
Phase = Literal["warm_start", "step"]
PHASES: tuple[Phase, ...] = ("warm_start", "step")

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gather on one rank of each replica, by way of the host, instead of everywhere.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class RunProgress:
    """How far a run is: `step` optimizer steps into `phase`."""

    phase: Phase
    step: int

    @property
    def folder(self) -> str:
        return f"{self.phase}_{self.step:08d}"

    @staticmethod
    def parse(folder: str) -> RunProgress | None:
        """The progress that a folder's name tells, or None for another folder."""
        phase, _, digits = folder.rpartition("_")
        known = {name: name for name in PHASES}.get(phase)  # type: ignore[call-overload]
        return RunProgress(known, int(digits)) if known and digits.isdigit() and len(digits) == 8 else None


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("*_*"):
        progress = RunProgress.parse(path.name)
        if progress is not None:
            found.append((PHASES.index(progress.phase), progress.step, path))
    return [path for _, _, path in sorted(found)]


def find_checkpoint(config: Config, parallel: Parallel, log: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` asks for, its files checked; None where the run starts afresh.

    A collective: folders can look different from different machines, so one rank looks and all follow,
    but all ranks read.  `resume=auto` takes the newest that is whole and says which it passes over.

    Raises:
        UserError: for a path that is none, damaged or one of another run where run.dir already holds a
            run; for `auto` where there are checkpoints and none is whole.
    """
    if config.resume == "never":
        return None
    run_dir = Path(config.run.dir)
    if config.resume != "auto":
        path = Path(config.resume)
        if (reason := damage_of(path, parallel)) is not None:
            raise UserError(f"{path} {reason}; resume from another one (resume=auto takes the newest)")
        if run_of(path) != run_dir.resolve() and run_dir.is_dir() and any(run_dir.iterdir()):
            raise UserError(
                f"run.dir={run_dir} holds another run than the checkpoint resume={path}; choose a new run.dir"
            )
        return path
    found = all_gather_objects(parallel, checkpoints(run_dir) if parallel.rank == 0 else None)[0]
    for path in reversed(found):
        if (reason := damage_of(path, parallel)) is None:
            return Path(path)
        log(f"warning: {path} {reason}; the one before it is tried")
    if found:
        raise UserError(
            f"no checkpoint of {run_dir} is whole: {found[0].name} {reason}; choose another run.dir, or "
            f"move {run_dir / 'checkpoints'} away to start afresh"
        )
    return None


def damage_of(path: Path, parallel: Parallel) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None where it is whole.  A collective."""
    entries, reason = None, None
    if parallel.rank == 0:
        try:
            _read_state(path)
            entries = read_manifest(path)
        except UserError as error:
            reason = str(error).removeprefix(f"{path} ")
        except ValueError as error:
            reason = f"is damaged ({error})"
    entries, reason = all_gather_objects(parallel, (entries, reason))[0]
    if entries is None:
        return str(reason)
    found = find_damage(path, entries, share_to_check(entries, parallel.rank, parallel.world_size))
    reasons = [one for one in all_gather_objects(parallel, found) if one is not None]
    return f"is damaged ({reasons[0]})" if reasons else None


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    return checkpoint.resolve().parent.parent


class PendingCheckpoint:
    """A checkpoint on its way to `<run.dir>/checkpoints/<progress>`, of the state of this moment."""

    def __init__(
        self,
        policy: Policy,
        config: Config,
        progress: RunProgress,
        extra: dict[str, Any] | None = None,
        beside: bool = False,
    ) -> None:
        """Take the state and begin; a collective of all ranks.

        Args:
            extra: what estimators remember, name → JSON value.
            beside: write in a process of its own while training goes on.

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
                    _sharded_state(policy, is_loading=False), str(self._partial), async_sharded_save=True
                )
                writer = AsyncWriter if beside else SyncWriter
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
                hand_over(written)
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
        return _failures_named(
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
        "model": _model_of(policy, config),
        "optimizer": _optimizer_of(config),
        "versions": {"opo_megatron": __version__, "torch": torch.__version__},
    }


def read_progress(path: Path) -> RunProgress:
    """How far a checkpoint is.

    Raises:
        UserError: when `path` is no checkpoint.
    """
    return RunProgress(**_read_state(path)["progress"])


def read_version(path: Path) -> int:
    """Optimizer steps behind the weights of a checkpoint."""
    return int(_read_state(path)["version"])


def read_vocabulary(path: Path) -> int:
    """Rows of the embedding in a checkpoint."""
    return int(_read_state(path)["model"]["vocab_size"])


def read_extra(path: Path) -> dict[str, Any]:
    """What estimators remembered when a checkpoint was written."""
    return dict(_read_state(path)["extra"])


def load(policy: Policy, config: Config, path: Path) -> None:
    """Set weights, optimizer and version from a checkpoint of any layout.

    Raises:
        UserError: when `path` is no checkpoint, or one of another model.
    """
    state = _read_state(path)
    for name, value in _model_of(policy, config).items():
        saved = state["model"].get(name)
        if saved != value:
            raise UserError(
                f"the checkpoint {path} holds a model with {name}={saved}, but this run's has "
                f"{name}={value}; use the recipe that it was trained with"
            )
    for name, value in _optimizer_of(config).items():
        if state["optimizer"][name] != value:
            raise UserError(
                f"the checkpoint {path} holds an optimizer with {name}={state['optimizer'][name]}, but this "
                f"run has {value}; set policy.distributed_optimizer and expert parallelism as they were"
            )
    policy.allocate_optimizer_state()
    with _failures_named(
        f"the checkpoint {path} is damaged",
        "resume from another one (resume=auto takes the newest: move this one away)",
    ):
        loaded = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(path))
        for i, chunk in enumerate(policy.chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.version = state["version"]


def _quiet_about_optimizer_shards() -> None:
    """Ranks but the first hold an empty `param_state`, as Megatron itself writes it, and it warns of that."""
    logging.getLogger("megatron.core.dist_checkpointing.validation").addFilter(
        lambda record: "('optimizer', 'param_state')" not in record.getMessage()
    )


_quiet_about_optimizer_shards()


keep_results_in_memory()


@contextmanager
def _failures_named(what: str, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Megatron and torch raise many kinds of errors for a file that is cut short or cannot be written."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        cause = next((rank[0] for rank in getattr(error, "failures", {}).values()), error)
        reason = next(iter(str(cause).splitlines()), "")[:200]
        raise kind(f"{what} ({type(cause).__name__}: {reason}); {remedy}") from error


def abandon_later(run_dir: Path, progress: RunProgress, attempt: int) -> None:
    """Rename checkpoints behind `progress`, which the run that goes on from there will not lead to."""
    reached = (PHASES.index(progress.phase), progress.step)
    for path in checkpoints(run_dir):
        later = RunProgress.parse(path.name)
        if later is not None and (PHASES.index(later.phase), later.step) > reached:
            path.rename(path.with_name(f"{path.name}.abandoned-by-attempt-{attempt}"))


def _optimizer_of(config: Config) -> dict[str, Any]:
    """What the optimizer's state is made of, apart from the layout: Megatron cannot convert it."""
    policy = config.policy
    return {
        "distributed_optimizer": policy.distributed_optimizer,
        "separate_experts": policy.expert_model_parallel_size > 1,
    }


def _model_of(policy: Policy, config: Config) -> dict[str, Any]:
    """What must agree; the longest sequence is no property of the weights."""
    model = asdict(config.policy.model) | {"vocab_size": policy.vocab_size}
    del model["max_sequence_length"]
    return model


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = dict(_METADATA)
    state: dict[str, Any] = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(policy.chunks)
    }
    gather_leanly(policy.optimizer)
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        RunProgress(**state["progress"])
        _ = state["version"] + 1, state["model"]["vocab_size"], dict(state["optimizer"]), dict(state["extra"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of a run ({error!r}); name a folder of <run.dir>/checkpoints"
        ) from None
    return state
