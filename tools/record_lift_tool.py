"""Trains the recipe in which the policy learns when to ask a tool → records/lift_tool.json

    python tools/record_lift_tool.py                      # three seeds, about ten minutes on two idle cores
    python tools/record_lift_tool.py --seeds 1 --no-record train.steps=5

Accuracy is the share of right answers to held-out problems, whatever they cost: `eval/accuracy` is the mean
reward, the price of questions included.  A problem is hard where its ride is long.  Both accuracy and how
often the tool is asked are counted in the responses of `opo eval`, before OPO and at the end.
Exit code 1 where a claim does not hold.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "lift_tool.yaml"
LONG_RIDE = 12
"""Characters of a prompt from which on its ride is long."""
EVAL = "eval/accuracy"
CLAIMS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "accuracy is at most 0.65 before OPO": lambda run: run["accuracy at the start"] <= 0.65,
    "accuracy is at least 0.90 at the end": lambda run: run["accuracy at the end"] >= 0.90,
    "the tool is used in at least 60 % of hard problems": lambda run: run["asks in hard problems"] >= 0.6,
    "the tool is used in at most 20 % of easy problems": lambda run: run["asks in easy problems"] <= 0.2,
}
"""Of every seed."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to `opo train`")
    options = parser.parse_intermixed_args()
    results = {f"seed {seed}": run(seed, options.overrides) for seed in options.seeds}
    print(json.dumps(results, indent=2))
    if not options.no_record:
        print(f"written to {write_record('lift_tool', results)}")
    missed = [
        f"{name}: {claim}" for claim, holds in CLAIMS.items() for name in results if not holds(results[name])
    ]
    for claim in missed:
        print(f"NOT MET: {claim}")
    return 1 if missed else 0


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """One whole `opo train` in its own process, start-up included, and `opo eval` before and after OPO."""
    print(f"seed {seed} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        started = time.monotonic()
        opo("train", RECIPE, f"run.dir={run_dir}", f"run.seed={seed}", *overrides)
        seconds = time.monotonic() - started
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        checkpoints = run_dir / "checkpoints"
        before = held_out(max(checkpoints.glob("warm_start_*")), Path(folder) / "before")
        after = held_out(max(checkpoints.glob("step_*")), Path(folder) / "after")
    return {
        "accuracy at the start": before["accuracy"],
        "accuracy at the end": after["accuracy"],
        "asks in hard problems": after["asks in hard problems"],
        "asks in easy problems": after["asks in easy problems"],
        "held-out problems before OPO": before,
        "held-out problems at the end": after,
        "seconds": seconds,
        "failures of environments": rows[-1]["run/environment_failures"],
        "largest |Δ log π| of any token": max(row["on_policy/logprob_diff_max"] for row in rows[1:]),
        "curve of eval/accuracy": {str(row["step"]): row["eval/accuracy"] for row in rows if EVAL in row},
        "curve of turns": [row["conversation/turns_mean"] for row in rows[1::10]],
    }


def opo(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "opo_megatron", *map(str, arguments)], check=True)


def held_out(checkpoint: Path, results: Path) -> dict[str, float]:
    """Right answers and questions, in the responses of one checkpoint to the held-out problems."""
    opo("eval", checkpoint, "--out", results)
    lines = (results / "samples_held_out.jsonl").read_text().splitlines()
    found: dict[str, list[tuple[bool, bool]]] = {"hard": [], "easy": []}
    for problem in map(json.loads, lines):
        kind = "hard" if len(problem["problem"]) >= LONG_RIDE else "easy"
        found[kind] += [(one["reward"] > 0, len(one["turns"]) > 1) for one in problem["samples"]]
    shares = {f"accuracy in {kind} problems": fmean(right for right, _ in found[kind]) for kind in found}
    asks = {f"asks in {kind} problems": fmean(asked for _, asked in found[kind]) for kind in found}
    return {"accuracy": fmean(right for kind in found.values() for right, _ in kind)} | shares | asks


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
