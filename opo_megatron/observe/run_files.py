"""The files of a run, written by rank 0: metrics, logger files, rollouts, resolved recipe, summary."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config, to_yaml
from opo_megatron.observe.loggers import Axis, MetricLogger, TensorBoard, WandB
from opo_megatron.observe.metrics_file import MetricsFile, MetricsRow
from opo_megatron.utils.start_folder import absolute


class RunFiles:
    """`<run.dir>` of one attempt; on ranks that do not write, methods do nothing."""

    def __init__(
        self, config: Config, *, is_writer: bool, step: int, warm_step: int | None, source: Path | None
    ) -> None:
        """Continue after `step`, and delete what later steps wrote.

        Args:
            is_writer: whether this rank writes.
            step: the last finished OPO step; −1 before step 0.
            warm_step: the last finished warm-start step; None once the warm start is over.
            source: the run whose checkpoint this one resumes from.
        """
        self.dir, self.is_writer = absolute(config.run.dir), is_writer
        self.metrics = MetricsFile(self.dir / "metrics.jsonl")
        self.warm_start = MetricsFile(self.dir / "warm_start.jsonl")
        self.audit = MetricsFile(self.dir / "audit.jsonl")
        self.timeline = MetricsFile(self.dir / "timeline.jsonl")
        self._loggers: list[MetricLogger] = []
        if not is_writer:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        if source is not None and source != self.dir.resolve():
            self._copy_rows(source)
        self.attempt = self._count_attempt()
        self.metrics.truncate_after(step)
        if config.observe.audit:
            self.audit.truncate_after(step)
        if config.rollout.overlap:
            self.timeline.truncate_after(step)
        if warm_step is not None:
            self.warm_start.truncate_after(warm_step)
        self._delete_rollouts_after(step)
        (self.dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        if config.observe.tensorboard:
            last_warm_step = config.warm_start.steps if warm_step is None else warm_step
            self._loggers.append(TensorBoard(self.dir, step, last_warm_step))
        if config.observe.wandb_project is not None:
            self._loggers.append(WandB(config, self.dir))

    def _copy_rows(self, other: Path) -> None:
        """Copy the rows of the run whose checkpoint this one resumes from."""
        for file in (self.metrics, self.warm_start, self.audit, self.timeline):
            if (other / file.path.name).exists():
                shutil.copyfile(other / file.path.name, file.path)

    def _count_attempt(self) -> int:
        """The number of this attempt: 1 for the first start in this folder."""
        path = self.dir / "attempts"
        attempt = int(path.read_text()) + 1 if path.exists() else 1
        path.write_text(f"{attempt}\n")
        return attempt

    def _delete_rollouts_after(self, step: int) -> None:
        for path in (self.dir / "rollouts").glob("step_*.safetensors"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def write_step(self, row: MetricsRow) -> None:
        """Log a finished OPO step."""
        self._write(self.metrics, "step", row)

    def write_audit(self, row: MetricsRow) -> None:
        """The audit of a finished OPO step."""
        if self.is_writer:
            self.audit.append(row)

    def write_timeline(self, row: MetricsRow) -> None:
        """When an overlapped step did what, on every rank."""
        if self.is_writer:
            self.timeline.append(row)

    def write_warm_start(self, row: MetricsRow) -> None:
        """Log a finished warm-start step."""
        self._write(self.warm_start, "warm_start", row)

    def _write(self, file: MetricsFile, axis: Axis, row: MetricsRow) -> None:
        if not self.is_writer:
            return
        for logger in self._loggers:
            logger.write(axis, row)
        file.append(row | {"run/attempt": self.attempt})

    def write_rollouts(self, step: int, rollouts: Rollouts | None) -> None:
        """The step's samples with rewards and advantages (given on the writing rank)."""
        if self.is_writer and rollouts is not None:
            rollouts.save(self.dir / "rollouts" / f"step_{step:08d}.safetensors")

    def write_nonfinite_batch(self, step: int, rollouts: Rollouts | None) -> Path:
        """Write the samples of a non-finite step (given on the writing rank); returns their path."""
        path = self.dir / "bad_batches" / f"step_{step:08d}.safetensors"
        if self.is_writer and rollouts is not None:
            rollouts.save(path)
        return path

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json atomically."""
        if not self.is_writer:
            return
        partial = self.dir / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(partial, self.dir / "summary.json")

    def close(self, failed: bool = False) -> None:
        for logger in self._loggers:
            logger.close(failed)
