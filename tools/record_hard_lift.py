"""Runs the harder lift with several seeds and records that it does not saturate → records/hard_lift.json

    python tools/record_hard_lift.py                  # seeds 1, 2, 3, about four minutes each on one core
    python tools/record_hard_lift.py --seeds 1 --no-record train.steps=10 warm_start.steps=20

Exit code 1 unless the pass@16 of every seed is between 0.5 and 0.85 at the end.
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
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

RECIPE = Path(__file__).parent.parent / "recipes" / "hard_lift.yaml"
CURVES = ("eval/accuracy", "eval/pass@16", "eval/response_length/mean")
LOWEST, HIGHEST = 0.5, 0.85
LAST = 50
"""Steps at the end over which groups without signal are averaged."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to `opo train`")
    arguments = parser.parse_intermixed_args()
    runs = [run(seed, arguments.overrides) for seed in arguments.seeds]
    results = {"runs": runs, "pass@16 at the end": [one["pass@16 at the end"] for one in runs]}
    print(json.dumps(results, indent=2))
    if not arguments.no_record:
        print(f"written to {write_record('hard_lift', results)}")
    missed = [value for value in results["pass@16 at the end"] if not LOWEST <= value <= HIGHEST]
    for value in missed:
        print(f"NOT MET: a pass@16 of {value:.3f} is not between {LOWEST} and {HIGHEST}")
    return 1 if missed else 0


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """One whole `opo train` in its own process, start-up included."""
    print(f"seed {seed} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={run_dir}"]
        started = time.monotonic()
        subprocess.run([*command, f"run.seed={seed}", *overrides], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/accuracy" in row]
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "pass@16 at the end": evaluated[-1]["eval/pass@16"],
        **{name: {str(row["step"]): row[name] for row in evaluated} for name in CURVES},
        "share of groups without signal at the end": fmean(
            row["groups/without_signal"] for row in rows[-LAST:] if "groups/without_signal" in row
        ),
    }


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
