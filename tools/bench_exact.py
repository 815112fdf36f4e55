"""Benchmarks exact mode: the quickstart with and without `rollout.local.exact=true` → records/exact.json

python tools/bench_exact.py                # two whole quickstarts
python tools/bench_exact.py --steps 20     # shorter ones; prints only

Both run on one thread, one after the other, from the same seed.  Rounding makes them diverge after some
steps, so times are also given per thousand response tokens.  Exit code 1 where any step of the exact run has
a maximum |Δ log π| other than 0, or where the run without exact mode has no difference at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.record import write_record
from bench_loop import PHASES, ROOT, phases, rows_of

from opo_megatron.utils.terminal import prepare_terminal

MODES = {
    "exact": ("rollout.local.exact=true", "on_policy.tolerance=0"),
    "usual": ("rollout.local.exact=false",),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, metavar="N", help="number of OPO steps; writes no record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {
            mode: measure(Path(folder) / mode, settings, arguments.steps) for mode, settings in MODES.items()
        }
    results["exact / usual"] = {name: ratio(results, name) for name in ("seconds of a step", *PHASES)}
    print(json.dumps(results, indent=2))
    if arguments.steps is None:
        print(f"written to {write_record('exact', results)}")
    differences = results["exact"]["largest |Δ log π| of every step"]
    is_exact = bool(differences) and all(difference == 0.0 for difference in differences)
    has_difference = max(results["usual"]["largest |Δ log π| of every step"]) > 0
    if not is_exact:
        print(f"NOT MET: every step is exact; the largest difference is {max(differences, default=None)}")
    if not has_difference:
        print("NOT MET: without exact mode there is a difference to remove")
    return 0 if is_exact and has_difference else 1


def measure(run: Path, settings: tuple[str, ...], steps: int | None) -> dict[str, Any]:
    """One quickstart by `opo train`."""
    command = [sys.executable, "-m", "opo_megatron", "train", str(ROOT / "recipes" / "quickstart.yaml")]
    command += [f"run.dir={run}", *settings]
    if steps is not None:
        command.append(f"train.steps={steps}")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = rows_of(run, "metrics.jsonl")[1:]
    summary = json.loads((run / "summary.json").read_text())
    return phases(run) | {
        "median seconds of a warm-start step": statistics.median(
            row["time/step"] for row in rows_of(run, "warm_start.jsonl")
        ),
        "median seconds per 1000 response tokens": {
            name: statistics.median(seconds_per_token(row, name) for row in rows) * 1000
            for name in ("seconds of a step", *PHASES)
        },
        "held-out accuracy at the end": summary["end"]["eval/accuracy"],
        "largest |Δ log π| of every step": [row["on_policy/logprob_diff_max"] for row in rows],
    }


def seconds_per_token(row: dict[str, Any], name: str) -> float:
    """Seconds per response token of one step and phase, evaluation excluded."""
    if name == "seconds of a step":
        seconds = row["time/step"] - row.get("time/eval", 0.0)
    else:
        seconds = row[f"time/{name}"]
    return float(seconds / row["tokens/response"])


def ratio(results: dict[str, Any], name: str) -> float:
    exact, usual = (results[mode]["median seconds per 1000 response tokens"][name] for mode in MODES)
    return float(exact / usual)


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
