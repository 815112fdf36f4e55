"""Which weights `opo eval` uses: a run's newest checkpoint, one checkpoint, or a recipe's initial ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from opo_megatron.errors import UserError

OVERRIDES = ("resume=never", "observe.kl=off", "observe.wandb_project=null")
"""Settings of a recipe that concern its training only."""


@dataclass(frozen=True)
class Source:
    """Where weights come from; neither `run` nor `checkpoint` where they are a recipe's initial ones."""

    recipe: Path
    run: Path | None = None
    checkpoint: Path | None = None

    @property
    def overrides(self) -> list[str]:
        """Overrides of the recipe's settings."""
        # A checkpoint's recipe is resolved: it has the architecture even if the initial folder is gone.
        return [*OVERRIDES, *(["policy.init_from=null"] if self.run or self.checkpoint else [])]


def find_source(path: Path, out: Path | None) -> Source:
    """What the command's first argument names.

    Raises:
        UserError: where it is none of the three, or a recipe without a folder for results.
    """
    if path.is_dir():
        if (path / "run_state.json").exists():
            return Source(path / "config.yaml", checkpoint=path)
        if not (path / "config.yaml").exists():
            raise UserError(
                f"{path} is neither the folder of a run (config.yaml is missing) nor a checkpoint "
                "(run_state.json is missing); name one of them, or a recipe with policy.init_from"
            )
        if not any((path / "checkpoints").glob("*_*")):
            raise UserError(f"the run {path} has no checkpoint yet; wait for one, or name another run")
        return Source(path / "config.yaml", run=path)
    if out is None and path.is_file():
        raise UserError(f"the recipe {path} has no folder for results; name one with --out DIR")
    return Source(path)
