"""Seconds and peak GPU memory of each phase of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from opo_megatron.observe.step_timeline import RankTimeline


class PhaseTimer:
    """Adds up wall-clock seconds by phase name."""

    def __init__(self, enter: Callable[[str], None]) -> None:
        """
        Args:
            enter: called with the name of a phase when it begins.
        """
        self._enter = enter
        self.timeline = RankTimeline()
        """Has the phases, and what a step notes inside of them."""
        self._phases: dict[str, None] = {}
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._enter(name)
        self._phases[name] = None
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        try:
            with self.timeline.interval(name):
                yield
        finally:
            if torch.cuda.is_initialized():
                peak = torch.cuda.max_memory_allocated() / 2**30
                self._peaks[f"memory/{name}_peak_gpu_gib"] = peak

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` of each phase, `time/step` since the timer's creation; on GPUs peak memory, too."""
        phases = {f"time/{name}": self.timeline.seconds(name) for name in self._phases}
        return phases | self._peaks | {"time/step": self.timeline.now()}
