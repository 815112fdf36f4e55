"""The files of a run, as a report needs them: metrics, settings, progress.

A run may be unfinished, resumed, without evaluations or without rollouts.  The recipe in `config.yaml` is not
validated, so that runs of other versions can be compared too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opo_megatron.config.compare import flat
from opo_megatron.errors import UserError
from opo_megatron.observe.metrics_file import MetricsFile, MetricsRow


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    path: Path
    name: str
    """The shortest end of the path that is unique among the runs of this report."""
    settings: dict[str, Any]
    """config.yaml by dotted key, in its order."""
    rows: list[MetricsRow]
    """metrics.jsonl by step; empty before the first row."""
    dumps: dict[int, Path]
    """Rollout files by step."""
    timeline: MetricsRow | None = None
    """The last row of timeline.jsonl; None where no step overlapped with generation."""

    @property
    def seed(self) -> Any:
        return self.settings.get("run.seed")

    @property
    def attempts(self) -> int:
        """Number of attempts, from the rows."""
        return int(max(self.series("run/attempt").values(), default=1))

    @property
    def steps(self) -> int:
        """Finished OPO steps."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def planned(self) -> int | None:
        value = self.settings.get("train.steps")
        return value if isinstance(value, int) else None

    @property
    def is_finished(self) -> bool:
        return self.planned is not None and self.steps >= self.planned

    def series(self, name: str) -> dict[int, float]:
        """A metric by step, where it was measured and is finite."""
        values = ((row["step"], row.get(name)) for row in self.rows)
        return {step: float(v) for step, v in values if isinstance(v, int | float) and math.isfinite(v)}

    def metrics(self) -> list[str]:
        """The names in any row."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs, in the order given, also those without rows.

    Raises:
        UserError: for a folder that is not a run, has a broken line, or is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(folders):
        if resolved[index] in resolved[:index]:
            raise UserError(f"{folder} is named twice; name each run once")
    return [_read(folder, name) for folder, name in zip(folders, short_names(resolved), strict=True)]


def leave_out_empty(runs: Sequence[Run], log: Callable[[str], None]) -> list[Run]:
    """The runs with rows; each other one is logged.

    Raises:
        UserError: where no run has a row.
    """
    empty = [run for run in runs if not run.rows]
    if len(empty) == len(runs):
        names = ", ".join(str(run.path) for run in runs)
        raise UserError(f"no metrics.jsonl of {names} has a row yet; wait for the first step, or name others")
    for run in empty:
        log(f"{run.path} is left out: its metrics.jsonl has no row yet")
    return [run for run in runs if run.rows]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The fewest last parts of the paths that make all of them different."""
    for count in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read(folder: Path, name: str) -> Run:
    recipe = folder / "config.yaml"
    if not recipe.is_file():
        raise UserError(f"{folder} is not the folder of a run ({recipe} is missing); name a run.dir")
    try:
        settings = flat(yaml.safe_load(recipe.read_bytes()))
    except yaml.YAMLError as error:
        raise UserError(f"{recipe} is not YAML ({str(error).splitlines()[0]}); fix it") from None
    if "train.steps" not in settings:
        raise UserError(f"{recipe} is not a resolved recipe (train.steps is missing); name a run.dir")
    return Run(
        path=folder,
        name=name,
        settings=settings,
        rows=_rows(folder, "metrics.jsonl"),
        dumps=_dumps(folder),
        timeline=next(reversed(_rows(folder, "timeline.jsonl")), None),
    )


def _rows(folder: Path, name: str) -> list[MetricsRow]:
    file = MetricsFile(folder / name)
    rows = file.read()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{file.path} line {number} has no step; fix or delete the line")
    return sorted(rows, key=lambda row: int(row["step"]))


def _dumps(folder: Path) -> dict[int, Path]:
    files = (folder / "rollouts").glob("step_*.safetensors")
    by_step = ((path.stem.removeprefix("step_"), path) for path in files)
    return dict(sorted((int(step), path) for step, path in by_step if step.isdecimal()))
