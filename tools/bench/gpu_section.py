"""What a section of check_gpu.py is: a function of the setting, with a limit of seconds.

A section returns its figures as a JSON object.  Under "not met" it lists those over their limit, as lines;
{"missing": why} is a section that this machine cannot run.  Everything else that goes wrong is an exception:
the section runs in a process of its own, whose last lines become its failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The machine and the interpreters that a section uses."""

    device: str
    """`cuda`, or `cpu`: the same section as far as a CPU goes, with a small model."""
    folder: Path
    """An empty folder of the section's own, for runs, logs and captured tensors."""
    sglang_python: str
    """Interpreter of the environment that has SGLang (`rollout.sglang.python`)."""
    sglang_options: tuple[str, ...] = ()
    """Further `key=value` options of the servers, as in `rollout.sglang.options.key=value`."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def sglang(self) -> list[str]:
        """The overrides that make a recipe use the servers of this machine."""
        options = [f"rollout.sglang.options.{option}" for option in self.sglang_options]
        return ["rollout.engine=sglang", f"rollout.sglang.python={self.sglang_python}", *options]


@dataclass(frozen=True)
class Section:
    """One line of check_gpu.py."""

    name: str
    seconds: int
    """Time limit on a GPU."""
    run: Callable[[Setting], Figures]
    alone: bool = False
    """Whether it measures time, so that nothing else may run on the GPU; others run side by side."""
    by_default: bool = True
    """False: only with `--only NAME`, with a time budget of its own."""
