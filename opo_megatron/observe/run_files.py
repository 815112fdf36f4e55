"""The files of a run, written by rank 0: metrics, curves, rollouts, resolved config, summary."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.checkpoint.checkpoint import RunProgress, abandon_later, run_of
from opo_megatron.config import Config, to_yaml
from opo_megatron.observe.loggers import Axis, Board, TensorBoard, WandB
from opo_megatron.observe.metrics_file import MetricsFile, MetricsRow


class RunFiles:
    """`<run.dir>` of one attempt; on ranks that do not write, every method does nothing."""

    def __init__(self, config: Config, writes: bool, progress: RunProgress, checkpoint: Path | None) -> None:
        """Continue behind `progress`, that of `checkpoint` where the run resumes from one."""
        self.dir, self.writes = Path(config.run.dir), writes
        self.metrics = MetricsFile(self.dir / "metrics.jsonl")
        self.warm_start = MetricsFile(self.dir / "warm_start.jsonl")
        self.audit = MetricsFile(self.dir / "audit.jsonl")
        self._boards: list[Board] = []
        if not writes:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None and run_of(checkpoint) != self.dir.resolve():
            self._copy_rows(run_of(checkpoint))
        self.attempt = self._count_attempt()
        in_warm_start = progress.phase == "warm_start"
        step = -1 if in_warm_start else progress.step
        self.metrics.cut_after(step)
        if config.observe.audit:
            self.audit.cut_after(step)
        if in_warm_start:
            self.warm_start.cut_after(progress.step)
        self._cut_rollouts(step)
        abandon_later(self.dir, progress, self.attempt)
        (self.dir / "config.yaml").write_text(to_yaml(config))
        if config.observe.tensorboard:
            warm_step = progress.step if in_warm_start else config.warm_start.steps
            self._boards.append(TensorBoard(self.dir, step, warm_step))
        if config.observe.wandb_project is not None:
            self._boards.append(WandB(config, self.dir))

    def _copy_rows(self, other: Path) -> None:
        """A run that goes on from another's checkpoint begins with that one's rows."""
        for file in (self.metrics, self.warm_start, self.audit):
            if (other / file.path.name).exists():
                shutil.copyfile(other / file.path.name, file.path)

    def _count_attempt(self) -> int:
        """1 for the first start in this folder, one more for each later one."""
        path = self.dir / "attempts"
        attempt = int(path.read_text()) + 1 if path.exists() else 1
        path.write_text(f"{attempt}\n")
        return attempt

    def _cut_rollouts(self, step: int) -> None:
        for path in (self.dir / "rollouts").glob("step_*.safetensors"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def write_step(self, row: MetricsRow) -> None:
        """One finished OPO step."""
        self._write(self.metrics, "step", row)

    def write_audit(self, row: MetricsRow) -> None:
        """What a finished OPO step was."""
        if self.writes:
            self.audit.append(row)

    def write_warm_start(self, row: MetricsRow) -> None:
        """One finished warm-start step."""
        self._write(self.warm_start, "warm_start", row)

    def _write(self, file: MetricsFile, axis: Axis, row: MetricsRow) -> None:
        if not self.writes:
            return
        for board in self._boards:
            board.write(axis, row)
        file.append(row | {"run/attempt": self.attempt})

    def write_rollouts(self, step: int, rollouts: Rollouts | None) -> None:
        """The step's samples with rewards and advantages (given on the writing rank)."""
        if self.writes and rollouts is not None:
            rollouts.save(self.dir / "rollouts" / f"step_{step:08d}.safetensors")

    def write_nonfinite_batch(self, step: int, rollouts: Rollouts | None) -> Path:
        """The samples of a step with bad numbers (given on the writing rank), and where they are."""
        path = self.dir / "bad_batches" / f"step_{step:08d}.safetensors"
        if self.writes and rollouts is not None:
            rollouts.save(path)
        return path

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json, replaced as a whole."""
        if not self.writes:
            return
        partial = self.dir / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(partial, self.dir / "summary.json")

    def close(self, failed: bool = False) -> None:
        for board in self._boards:
            board.close(failed)
