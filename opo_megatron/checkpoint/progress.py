"""The checkpoints of a run, their progress, and the one to resume from."""

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
from opo_megatron.utils.start_folder import absolute, shown

STATE_FILE = "run_state.json"
CONFIG_FILE = "config.yaml"
"""The resolved recipe of the run that wrote the checkpoint."""
Phase = Literal["warm_start", "step"]
PHASES: tuple[Phase, ...] = ("warm_start", "step")


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run: `step` optimizer steps of `phase` are done."""

    phase: Phase
    step: int

    @property
    def folder(self) -> str:
        return f"{self.phase}_{self.step:08d}"

    @staticmethod
    def parse(folder: str) -> RunProgress | None:
        """The progress in a checkpoint's folder name; None for another folder."""
        prefix, _, digits = folder.rpartition("_")
        phase = {name: name for name in PHASES}.get(prefix)  # type: ignore[call-overload]
        return RunProgress(phase, int(digits)) if phase and digits.isdigit() and len(digits) == 8 else None


def checkpoints(run_dir: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    entries = []
    for path in (run_dir / "checkpoints").glob("*_*"):
        progress = RunProgress.parse(path.name)
        if progress is not None:
            entries.append((PHASES.index(progress.phase), progress.step, path))
    return [path for _, _, path in sorted(entries)]


def find_checkpoint(config: Config, parallel: Parallel, log: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` selects, with its files verified; None if the run starts from scratch.

    A collective: machines can see different folders, so rank 0 lists them, and all ranks verify files.
    `resume=auto` takes the newest intact checkpoint and logs those that it skips.

    Raises:
        UserError: for a path that is not a checkpoint, is damaged, or belongs to another run than the one
            in run.dir; for `auto` if there are checkpoints but none is intact.
    """
    if config.resume == "never":
        return None
    run_dir = absolute(config.run.dir)
    if config.resume != "auto":
        path = absolute(config.resume)
        if (reason := damage_of(path, parallel)) is not None:
            raise UserError(
                f"{config.resume} {reason}; resume from another one (resume=auto takes the newest)"
            )
        if run_of(path) != run_dir.resolve() and run_dir.is_dir() and any(run_dir.iterdir()):
            raise UserError(
                f"run.dir={config.run.dir} holds another run than the checkpoint resume={config.resume}; "
                "choose a new run.dir"
            )
        return path
    candidates = all_gather_objects(parallel, checkpoints(run_dir) if parallel.rank == 0 else None)[0]
    for path in reversed(candidates):
        if (reason := damage_of(path, parallel)) is None:
            return Path(path)
        log(f"warning: {shown(path)} {reason}; trying the previous one")
    if candidates:
        raise UserError(
            f"no checkpoint of {config.run.dir} is intact: {candidates[0].name} {reason}; choose another "
            f"run.dir, or move {shown(run_dir / 'checkpoints')} away to start from scratch"
        )
    return None


def damage_of(path: Path, parallel: Parallel) -> str | None:
    """What is wrong with a checkpoint, as a predicate ("is damaged …"); None if intact.  A collective."""
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
    damage = find_damage(path, entries, share_to_check(entries, parallel.rank, parallel.world_size))
    reasons = [one for one in all_gather_objects(parallel, damage) if one is not None]
    return f"is damaged ({reasons[0]})" if reasons else None


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    return checkpoint.resolve().parent.parent


def read_progress(path: Path) -> RunProgress:
    """The progress of a checkpoint.

    Raises:
        UserError: when `path` is not a checkpoint.
    """
    return RunProgress(**read_run_state(path)["progress"])


def read_version(path: Path) -> int:
    """Weight version of a checkpoint: its number of optimizer steps."""
    return int(read_run_state(path)["version"])


def read_vocabulary(path: Path) -> int:
    """Vocabulary size of a checkpoint: rows of its embedding."""
    return int(read_run_state(path)["model"]["vocab_size"])


def read_estimator_state(path: Path) -> dict[str, Any]:
    """The estimators' state in a checkpoint."""
    return dict(read_run_state(path)["extra"])


def abandon_later(run_dir: Path, progress: RunProgress, attempt: int) -> None:
    """Rename checkpoints after `progress`: the run resumes from there and will not reach them."""
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
