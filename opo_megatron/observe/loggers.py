"""Metric loggers: TensorBoard, and Weights & Biases if the recipe sets a project.

Both log the rows of metrics.jsonl under the same names.  Warm-start steps have their own axis: a subfolder in
TensorBoard, the prefix `warm_start/` in W&B.  A step that a resumed run repeats replaces the earlier one in
TensorBoard; W&B deletes nothing and shows both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from opo_megatron.config import Config, to_yaml
from opo_megatron.errors import UserError
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.utils.extras import require_extra

Axis = Literal["step", "warm_start"]


class MetricLogger(Protocol):
    def write(self, axis: Axis, row: MetricsRow) -> None:
        """Log a row at its step."""
        ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """`<run.dir>/tensorboard`, purged after the last step that is kept on each axis."""

    def __init__(self, run_dir: Path, step: int, warm_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / "tensorboard"
        self._writers = {
            "step": SummaryWriter(folder, purge_step=step + 1),
            "warm_start": SummaryWriter(folder / "warm_start", purge_step=warm_step + 1),
        }

    def write(self, axis: Axis, row: MetricsRow) -> None:
        for name, value in row.items():
            if name != "step":
                self._writers[axis].add_scalar(name, value, row["step"])

    def close(self, failed: bool) -> None:
        for writer in self._writers.values():
            writer.close()


class WandB:
    """One W&B run per `run.dir`, which a resumed run continues; W&B's variables set all but the project."""

    ID_FILE = "wandb_run_id"

    def __init__(self, config: Config, run_dir: Path) -> None:
        wandb = load_wandb(config)
        id_file = run_dir / self.ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else os.environ.get("WANDB_RUN_ID")
        try:
            self._run = wandb.init(
                project=config.observe.wandb_project,
                id=run_id,
                resume="allow",
                dir=None if "WANDB_DIR" in os.environ else str(run_dir),
                config=yaml.safe_load(to_yaml(config)),
            )
        except wandb.Error as error:
            raise _unavailable(config, str(error)) from error
        id_file.write_text(f"{self._run.id}\n")
        self._defined: set[str] = set()

    def write(self, axis: Axis, row: MetricsRow) -> None:
        prefix = "warm_start/" if axis == "warm_start" else ""
        named = {prefix + name: value for name, value in row.items()}
        for name in named.keys() - self._defined:
            self._run.define_metric(name, step_metric=prefix + "step" if name != prefix + "step" else None)
        self._defined |= named.keys()
        self._run.log(named)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def load_wandb(config: Config) -> Any:
    """The package, with credentials where the mode needs them; never prompts.

    Raises:
        UserError: naming what to install, or how to run without an account.
    """
    wandb = require_extra("wandb", f"observe.wandb_project={config.observe.wandb_project}", "wandb")
    try:
        mode = wandb.setup().settings.mode
        if mode in ("online", "shared") and not wandb.login(prompt=False, verify=False):
            raise _unavailable(config, "no API key is configured")
    except (wandb.Error, ValueError) as error:
        raise _unavailable(config, str(error)) from error
    return wandb


def _unavailable(config: Config, reason: str) -> UserError:
    return UserError(
        f"observe.wandb_project={config.observe.wandb_project}, but W&B cannot be used ({reason}); set "
        "WANDB_API_KEY, or WANDB_MODE=offline to run without an account, or observe.wandb_project=null"
    )
