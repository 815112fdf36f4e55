"""When a step trained, judged, updated and generated: a row of `timeline.jsonl`, shown by `opo report`.

Times are in seconds since the step began, on each rank's own clock; ranks begin a step within the time of a
barrier.  Intervals of one trainer do not overlap.  Only steps that overlap with generation are written: in
the others the phases follow each other, and `time/…` in metrics.jsonl says it all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opo_megatron.observe.metrics_file import MetricsRow

ENGINE = "engine"
"""Name of the interval during which a rank's requests were unfinished."""
LOST = "lost"
"""Name of the interval that an engine failure made worthless."""
ENDED = "ended"
"""Key of the times at which responses ended."""
DECIMALS = 6


@dataclass
class RankTimeline:
    """What one rank did in a step."""

    started: float = field(default_factory=time.perf_counter)
    intervals: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, begin, end), in seconds since the start."""
    ended: list[float] = field(default_factory=list)
    """When each response ended that this rank asked for."""
    attempts: int = 0

    def now(self) -> float:
        return time.perf_counter() - self.started

    @contextmanager
    def interval(self, name: str) -> Iterator[None]:
        """Note what happens inside, kernels included."""
        import torch  # not above: `opo report` needs this file, and is fast without it

        began = self.now()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.intervals.append((name, began, self.now()))

    def begin_attempt(self, continues: bool) -> None:
        """Generation begins.

        Args:
            continues: after an engine failure, whether nothing was lost but unreceived tokens.
        """
        self.attempts += 1
        if self.attempts > 1 and not continues:
            self.intervals, self.ended = [(LOST, 0.0, self.now())], []

    def note_engine(self, began: float, ended: Sequence[float], is_complete: bool) -> None:
        """Note when requests were sent and when each response ended, by `time.perf_counter`.

        Args:
            is_complete: whether all have ended; the engine failed otherwise.
        """
        self.ended += [one - self.started for one in ended]
        end = self.now() if not is_complete else self.ended[-1] if ended else None
        if end is not None:
            self.intervals.append((ENGINE, began - self.started, end))

    def seconds(self, name: str, until: float = float("inf")) -> float:
        """Sum of the intervals of this name that have ended by then."""
        return sum(end - begin for one, begin, end in self.intervals if one == name and end <= until)

    def columns(self) -> dict[str, Any]:
        """Name → intervals, and the times at which responses ended."""
        columns: dict[str, Any] = {}
        for name, begin, end in self.intervals:
            columns.setdefault(name, []).append([round(begin, DECIMALS), round(end, DECIMALS)])
        return columns | {ENDED: [round(one, DECIMALS) for one in self.ended]}


def timeline_row(step: int, ranks: Sequence[RankTimeline]) -> MetricsRow:
    """The row of a step, from the timelines of all ranks in their order."""
    last = max(end for rank in ranks for _, _, end in rank.intervals)
    return {"step": step, "seconds": round(last, DECIMALS), "ranks": [rank.columns() for rank in ranks]}
