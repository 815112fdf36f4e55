"""Checkpoints of a run: weights, optimizer and progress, visible under their name only when complete.

Megatron's `dist_checkpointing` writes them so that any parallel layout can read them back, the
distributed optimizer's state included.  Random numbers, prompt order and learning rate are functions
of (seed, step), so the step is all the state there is besides the tensors.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from opo_megatron import __version__
from opo_megatron.config import Config
from opo_megatron.errors import UserError
from opo_megatron.policy.policy import Policy

STATE_FILE = "run_state.json"
Phase = Literal["warm_start", "step"]
PHASES: tuple[Phase, ...] = ("warm_start", "step")

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Progress:
    """How far a run is: `step` optimizer steps into `phase`."""

    phase: Phase
    step: int

    @property
    def folder(self) -> str:
        return f"{self.phase}_{self.step:08d}"

    @staticmethod
    def parse(folder: str) -> Progress | None:
        """The progress that a folder's name tells, or None for another folder."""
        phase, _, digits = folder.rpartition("_")
        known = {name: name for name in PHASES}.get(phase)  # type: ignore[call-overload]
        return Progress(known, int(digits)) if known and digits.isdigit() and len(digits) == 8 else None


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    found = []
    for path in (run_dir / "checkpoints").glob("*_*"):
        progress = Progress.parse(path.name)
        if progress is not None:
            found.append((PHASES.index(progress.phase), progress.step, path))
    return [path for _, _, path in sorted(found)]


def save(policy: Policy, config: Config, progress: Progress) -> None:
    """Write `<run.dir>/checkpoints/<progress>`; a collective of all ranks."""
    final = Path(config.run.dir) / "checkpoints" / progress.folder
    partial = final.with_name(final.name + ".partial")
    if policy.parallel.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=policy.parallel.cpu_group)
    dist_checkpointing.save(_sharded_state(policy, is_loading=False), str(partial))
    if policy.parallel.rank == 0:
        state = {
            "progress": asdict(progress),
            "version": policy.version,
            "model": _model_of(policy, config),
            "versions": {"opo_megatron": __version__, "torch": torch.__version__},
        }
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    dist.barrier(group=policy.parallel.cpu_group)


def read_progress(path: Path) -> Progress:
    """How far a checkpoint is.

    Raises:
        UserError: when `path` is no checkpoint.
    """
    return Progress(**_read_state(path)["progress"])


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
    policy.allocate_optimizer_state()
    loaded = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(path))
    for i, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.version = state["version"]


def _model_of(policy: Policy, config: Config) -> dict[str, Any]:
    return asdict(config.policy.model) | {"vocab_size": policy.vocab_size}


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
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a checkpoint of a run ({error}); name a folder of <run.dir>/checkpoints"
        ) from None
    return state
