"""Seconds and peak GPU memory of each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall-clock seconds by phase name."""

    def __init__(self, enter: Callable[[str], None]) -> None:
        """
        Args:
            enter: called with the name of a phase when it begins.
        """
        self._enter = enter
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._peaks: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._enter(name)
        started = time.perf_counter()
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # the phase includes its kernels
                peak = torch.cuda.max_memory_allocated() / 2**30
                self._peaks[f"memory/{name}_peak_gpu_gib"] = peak
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` of each phase, `time/step` since the timer's creation; on GPUs peak memory, too."""
        phases = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return phases | self._peaks | {"time/step": time.perf_counter() - self._started}
