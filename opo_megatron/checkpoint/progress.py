"""Which checkpoints a run has, how far each is, and which one a run resumes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opo_megatron.checkpoint.manifest import find_damage, read_manifest, share_to_check
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import UserError

STATE_FILE = "run_state.json"
CONFIG_FILE = "config.yaml"
"""The recipe, resolved, of the run that wrote the checkpoint."""
Phase = Literal["warm_start", "step"]
PHASES: tuple[Phase, ...] = ("warm_start", "step")


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
            read_run_state(path)
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


def read_progress(path: Path) -> RunProgress:
    """How far a checkpoint is.

    Raises:
        UserError: when `path` is no checkpoint.
    """
    return RunProgress(**read_run_state(path)["progress"])


def read_version(path: Path) -> int:
    """Optimizer steps behind the weights of a checkpoint."""
    return int(read_run_state(path)["version"])


def read_vocabulary(path: Path) -> int:
    """Rows of the embedding in a checkpoint."""
    return int(read_run_state(path)["model"]["vocab_size"])


def read_estimator_state(path: Path) -> dict[str, Any]:
    """What estimators remembered when a checkpoint was written."""
    return dict(read_run_state(path)["extra"])


def abandon_later(run_dir: Path, progress: RunProgress, attempt: int) -> None:
    """Rename checkpoints behind `progress`, which the run that goes on from there will not lead to."""
    reached = (PHASES.index(progress.phase), progress.step)
    for path in checkpoints(run_dir):
        later = RunProgress.parse(path.name)
        if later is not None and (PHASES.index(later.phase), later.step) > reached:
            path.rename(path.with_name(f"{path.name}.abandoned-by-attempt-{attempt}"))


def read_run_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
        RunProgress(**state["progress"])
        _ = state["version"] + 1, state["model"]["vocab_size"], dict(state["optimizer"]), dict(state["extra"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a checkpoint of a run ({error!r}); name a folder of <run.dir>/checkpoints"
        ) from None
    return state
