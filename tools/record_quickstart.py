"""Runs the quickstart with several seeds and records accuracy, response length and time.

python tools/record_quickstart.py                 # seeds 1, 2, 3 → records/quickstart.json
python tools/record_quickstart.py --seeds 1 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


CLAIMS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "at most 0.65 after the warm start": lambda r: r["accuracy after warm start, largest"] <= 0.65,
    "at least 0.94 at the end on average": lambda r: r["accuracy at the end, mean over seeds"] >= 0.94,
    "never below 0.90 at the end": lambda r: r["accuracy at the end, smallest"] >= 0.90,
    "responses grow by 30 %": lambda r: r["growth of the mean response length, smallest"] >= 1.3,
    "at most 5 minutes": lambda r: r["seconds of one run, largest"] <= 300,
}
"""Requirements; exit code 1 where one is not met."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to `opo train`")
    arguments = parser.parse_intermixed_args()
    runs = [run(seed, arguments.overrides) for seed in arguments.seeds]
    accuracies = [r["end"]["eval/accuracy"] for r in runs]
    lengths = [r["end"]["eval/response_length/mean"] / r["start"]["eval/response_length/mean"] for r in runs]
    results = {
        "runs": runs,
        "accuracy after warm start, largest": max(r["start"]["eval/accuracy"] for r in runs),
        "accuracy at the end, mean over seeds": statistics.mean(accuracies),
        "accuracy at the end, smallest": min(accuracies),
        "growth of the mean response length, smallest": min(lengths),
        "seconds of one run, largest": max(r["seconds"] for r in runs),
    }
    path = write_record("quickstart", results)
    print(json.dumps({name: value for name, value in results.items() if name != "runs"}, indent=2))
    print(f"written to {path}")
    missed = [claim for claim, holds in CLAIMS.items() if not holds(results)]
    for claim in missed:
        print(f"NOT MET: {claim}")
    return 1 if missed else 0


def run(seed: int, overrides: list[str]) -> dict[str, Any]:
    """One whole `opo train` in its own process, start-up included."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={run_dir}"]
        command += [f"run.seed={seed}", *overrides]
        started = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - started
        summary = json.loads((run_dir / "summary.json").read_text())
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        warm = [json.loads(line) for line in (run_dir / "warm_start.jsonl").read_text().splitlines()]
    updates = rows[1:]
    return {
        "seed": seed,
        "seconds": seconds,
        "seconds of the warm start": sum(row["time/step"] for row in warm),
        "median seconds of a step": statistics.median(row["time/step"] for row in updates),
        "median seconds by phase": {
            phase: statistics.median(row[f"time/{phase}"] for row in updates)
            for phase in ("rollout", "reward", "train", "sync")
        },
        "largest |Δ log π| of any token": max(row["on_policy/logprob_diff_max"] for row in updates),
        "start": {name: value for name, value in summary["start"].items() if name.startswith("eval/")},
        "end": {name: value for name, value in summary["end"].items() if name.startswith("eval/")},
        "curve of eval/accuracy": {
            str(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row
        },
    }


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
