"""When a checkpoint is due, and which checkpoints are kept.

A checkpoint is due every `every_steps` steps or `every_minutes` minutes, at the last step (`at_end`), and
when the metric of `keep_best` is the best so far.  The newest `keep_last` checkpoints are kept, and the
best one.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opo_megatron.checkpoint.progress import RunProgress, checkpoints
from opo_megatron.config.choices import Better
from opo_megatron.config.schema import CheckpointConfig
from opo_megatron.errors import UserError

REMOVED = ".removed"
"""Name suffix of a checkpoint being deleted, so that a partly deleted one has no valid name."""
BEST = "best"
"""Key of the best checkpoint in the run's state."""


@dataclass
class Retention:
    """Schedule and retention of one run's checkpoints; `state` is the run's, saved in every checkpoint."""

    config: CheckpointConfig
    state: dict[str, Any]
    saved_at: float = field(default_factory=time.monotonic)
    is_off: bool = False
    """Never save."""
    _best_before: dict[str, Any] | None = None

    def minutes_are_over(self) -> bool:
        """Whether `every_minutes` have passed by this rank's clock; the ranks still have to agree."""
        every = self.config.every_minutes
        return every > 0 and time.monotonic() - self.saved_at >= 60 * every

    def is_due(self, step: int, last: int, minutes_are_over: bool, is_best: bool) -> bool:
        """Whether to save after step `step` of `last`."""
        every = self.config.every_steps
        if self.is_off:
            return False
        is_last = step == last and self.config.at_end
        return is_last or (every > 0 and step % every == 0) or minutes_are_over or is_best

    def note_best(self, row: dict[str, Any], progress: RunProgress) -> bool:
        """Whether this step is the best so far by the metric of `keep_best`; if so, it is recorded.

        Raises:
            UserError: if a row with an evaluation lacks the metric.
        """
        name = self.config.keep_best
        if name is None:
            return False
        if name not in row:
            if any(key.startswith("eval/") for key in row):
                raise UserError(
                    f"checkpoint.keep_best={name}, but no step has a metric of that name; those with an "
                    f"evaluation have {', '.join(sorted(key for key in row if key.startswith('eval/')))}"
                )
            return False
        value, best = row[name], self.state.get(BEST)
        sign = 1.0 if self.config.keep_best_is is Better.highest else -1.0
        if value is None or value != value:
            return False
        if best is not None and best["metric"] == name and sign * value <= sign * best["value"]:
            return False
        self._best_before = best
        self.state[BEST] = {"metric": name, "value": value, "checkpoint": progress.folder}
        return True

    def failed(self, progress: RunProgress) -> None:
        """A checkpoint could not be written: restore the previous best."""
        if self.state.get(BEST, {}).get("checkpoint") == progress.folder:
            del self.state[BEST]
            if self._best_before is not None:
                self.state[BEST] = self._best_before

    def saved(self, run_dir: Path, writes: bool) -> None:
        """A checkpoint was written: delete those not kept, on the rank that writes."""
        self.saved_at = time.monotonic()
        if not writes or self.config.keep_last == 0:
            return
        best = self.state.get(BEST, {}).get("checkpoint") if self.config.keep_best else None
        for path in checkpoints(run_dir)[: -self.config.keep_last]:
            if path.name != best:
                # Renamed first: an interrupted deletion must not look like a damaged checkpoint.
                path.rename(path.with_name(path.name + REMOVED))
        for path in (run_dir / "checkpoints").glob("*" + REMOVED):
            shutil.rmtree(path)
