"""Seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up wall-clock seconds by phase name."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # a phase ends when its kernels have
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """`time/<phase>` of each phase, and `time/step` since the timer was made."""
        phases = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        return phases | {"time/step": time.perf_counter() - self._started}
