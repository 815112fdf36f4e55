"""Times OPO's step in two commits, interleaved in one run, with an interval from one commit against itself.

Each tree has a process of its own that waits for its turn; a second one of the old commit shows what the
machine alone makes of a ratio.  In every round each takes one step, in random order, and the ratios are
formed within a round, so that a change of the machine's speed concerns all.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

RESAMPLES = 2000
NEW, OLD, AGAIN = "working tree", "commit", "commit again"


def compare(script: Path, trees: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Seconds and ratios of steps.

    Args:
        script: called with `--worker` in each tree: it prints a line when it is ready, and the seconds of a
            step for each line that it reads.
        trees: of `NEW` and `OLD`.
    """
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {NEW: [], OLD: [], AGAIN: []}
    with ExitStack() as resources:
        workers = {
            name: resources.enter_context(_worker(script, trees[OLD if name == AGAIN else name]))
            for name in seconds
        }
        for number in range(rounds + 1):
            for name in rng.sample([*workers], len(workers)):
                taken = _step(workers[name])
                if number:  # the first round warms up
                    seconds[name].append(taken)
            if number:
                print(f"round {number}: {NEW} / {OLD} {_ratio(seconds, NEW):.4f}", flush=True)
    new, again = (_interval(seconds, name) for name in (NEW, AGAIN))
    return {
        "seconds, median": {name: median(values) for name, values in seconds.items()},
        f"{NEW} / {OLD}": new,
        f"{AGAIN} / {OLD}": again,
        # No farther from 1 than the commit is from itself.
        "unchanged": new[1] <= max(1.0, again[2]) and new[2] >= min(1.0, again[1]),
    }


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    return median(a / b for a, b in zip(seconds[name], seconds[OLD], strict=True))


def _interval(seconds: dict[str, list[float]], name: str) -> tuple[float, float, float]:
    """Median ratio to the commit's step, and its 95 % bootstrap interval over rounds."""
    rng = random.Random(0)
    ratios = [a / b for a, b in zip(seconds[name], seconds[OLD], strict=True)]
    medians = sorted(median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]
    return round(median(ratios), 4), round(low, 4), round(high, 4)


@contextmanager
def _worker(script: Path, tree: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(script), "--worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    try:
        _read(process)
        yield process
    finally:
        process.kill()
        process.wait()


def _step(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    return float(_read(process))


def _read(process: subprocess.Popen[str]) -> str:
    """The worker's next line; what Megatron prints between them is skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("WORKER "):
            return line.removeprefix("WORKER ").strip()
    raise RuntimeError(f"a worker ended with exit code {process.wait()}")


def serve(step: Any) -> None:
    """The worker's side: `step()` returns seconds."""
    print("WORKER ready", flush=True)
    for _ in sys.stdin:
        print(f"WORKER {step()}", flush=True)
