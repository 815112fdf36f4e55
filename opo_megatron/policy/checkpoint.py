"""Checkpoints of a run: weights, optimizer and progress, visible under their name only when complete.

Megatron's `dist_checkpointing` writes them so that any parallel layout can read them back, the
distributed optimizer's state included.  Random numbers, prompt order and learning rate are functions
of (seed, step), so the step is all the state there is besides the tensors.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint import CheckpointException

from opo_megatron import __version__
from opo_megatron.config import Config
from opo_megatron.errors import UserError
from opo_megatron.policy.policy import Policy

STATE_FILE = "run_state.json"
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


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that `resume` asks for; None where the run starts afresh.

    Raises:
        UserError: for a path that is none, or one of another run where run.dir already holds a run.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = checkpoints(Path(config.run.dir))
        return found[-1] if found else None
    path = Path(config.resume)
    read_progress(path)
    run_dir = Path(config.run.dir)
    if run_of(path) != run_dir.resolve() and run_dir.is_dir() and any(run_dir.iterdir()):
        raise UserError(
            f"run.dir={run_dir} holds another run than the checkpoint resume={path}; choose a new run.dir"
        )
    return path


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    return checkpoint.resolve().parent.parent


def save(policy: Policy, config: Config, progress: RunProgress) -> None:
    """Write `<run.dir>/checkpoints/<progress>`; a collective of all ranks."""
    _check_buckets(policy)
    final = Path(config.run.dir) / "checkpoints" / progress.folder
    partial = final.with_name(final.name + ".partial")
    if policy.parallel.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=policy.parallel.cpu_group)
    with _failures_named(f"the checkpoint {final} cannot be written", "give the disk space"):
        dist_checkpointing.save(_sharded_state(policy, is_loading=False), str(partial))
    if policy.parallel.rank == 0:
        state = {
            "progress": asdict(progress),
            "version": policy.version,
            "model": _model_of(policy, config),
            "optimizer": _optimizer_of(config),
            "versions": {"opo_megatron": __version__, "torch": torch.__version__},
        }
        with (partial / STATE_FILE).open("w") as file:
            file.write(json.dumps(state, indent=2) + "\n")
            os.fsync(file.fileno())
        os.replace(partial, final)
    dist.barrier(group=policy.parallel.cpu_group)


def read_progress(path: Path) -> RunProgress:
    """How far a checkpoint is.

    Raises:
        UserError: when `path` is no checkpoint.
    """
    return RunProgress(**_read_state(path)["progress"])


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


@contextmanager
def _failures_named(what: str, remedy: str) -> Iterator[None]:
    """Megatron and torch raise many kinds of errors for a file that is cut short or cannot be written."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        cause = next((rank[0] for rank in getattr(error, "failures", {}).values()), error)
        reason = next(iter(str(cause).splitlines()), "")[:200]
        raise UserError(f"{what} ({type(cause).__name__}: {reason}); {remedy}") from error


def abandon_later(run_dir: Path, progress: RunProgress, attempt: int) -> None:
    """Rename checkpoints behind `progress`, which the run that goes on from there will not lead to."""
    reached = (PHASES.index(progress.phase), progress.step)
    for path in checkpoints(run_dir):
        later = RunProgress.parse(path.name)
        if later is not None and (PHASES.index(later.phase), later.step) > reached:
            path.rename(path.with_name(f"{path.name}.abandoned-by-attempt-{attempt}"))


def _check_buckets(policy: Policy) -> None:
    """Megatron takes wrong elements of a gradient buffer that has padding between its buckets."""
    for chunk in policy.ddp_chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            for bucket in buffer.buckets[:-1]:
                if policy.config.distributed_optimizer and bucket.numel_unpadded != bucket.grad_data.numel():
                    raise RuntimeError("a padded gradient bucket would make a corrupt checkpoint")


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
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        RunProgress(**state["progress"])
        _ = state["version"] + 1, state["model"]["vocab_size"], dict(state["optimizer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of a run ({error!r}); name a folder of <run.dir>/checkpoints"
        ) from None
    return state
