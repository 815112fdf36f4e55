"""Trains the recipe in which the policy learns when to ask a tool → records/lift_tool.json

    python tools/record_lift_tool.py                      # three seeds, about ten minutes on two idle cores
    python tools/record_lift_tool.py --seeds 1 --no-record train.steps=5

Accuracy is the share of right answers, whatever they cost, which reward tells: `eval/accuracy` is the mean
reward, the price of questions included.  A problem is hard where its ride is long.  Both, and how often the
tool is asked, are counted in the rollouts of the first step and of the last ones.
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

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "lift_tool.yaml"
LONG_RIDE = 12
"""Characters of a prompt from which on its ride is long."""
LAST_STEPS = 5
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
    """One whole `opo train` in its own process, start-up included."""
    print(f"seed {seed} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={run_dir}"]
        started = time.monotonic()
        subprocess.run([*command, f"run.seed={seed}", *overrides], check=True)
        seconds = time.monotonic() - started
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        files = sorted((run_dir / "rollouts").glob("*.safetensors"))
        asks = [questions(file) for file in files]
        right = [share_right(file) for file in files]
    curve = {str(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    return {
        "accuracy at the start": right[0],
        "accuracy at the end": fmean(right[-LAST_STEPS:]),
        "seconds": seconds,
        "eval/accuracy at the start": next(iter(curve.values())),
        "eval/accuracy at the end": list(curve.values())[-1],
        "asks in hard problems": fmean(hard for hard, _ in asks[-LAST_STEPS:]),
        "asks in easy problems": fmean(easy for _, easy in asks[-LAST_STEPS:]),
        "failures of environments": rows[-1]["run/environment_failures"],
        "largest |Δ log π| of any token": max(row["on_policy/logprob_diff_max"] for row in rows[1:]),
        "curve of eval/accuracy": curve,
        "curve of asks (hard, easy)": asks[::10],
    }


def share_right(path: Path) -> float:
    """The share of a step's answers that are right."""
    rewards = Rollouts.load(path).rewards
    assert rewards is not None
    return float((rewards > 0).double().mean())


def questions(path: Path) -> tuple[float, float]:
    """The shares of hard and of easy problems of a step, by sample, that ask the tool."""
    rollouts = Rollouts.load(path)
    assert rollouts.given_lengths is not None
    asked: dict[bool, list[bool]] = {True: [], False: []}
    prompts = rollouts.prompt_tokens.split(rollouts.prompt_lengths.tolist())
    for prompt, given in zip(prompts, rollouts.given_lengths.tolist(), strict=True):
        asked[len(LiftTask.decode(prompt.tolist())) >= LONG_RIDE].append(given > 0)
    return fmean(asked[True]), fmean(asked[False])


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
