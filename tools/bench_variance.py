"""Measures gradient variance by baseline on the quickstart, and the weights of `auto` → records/variance.json

    python tools/bench_variance.py              # three seeds, two kinds of gradients, about ten minutes

Whole quickstarts with `baseline=auto`, whose reports measure every estimator on the same samples: all 48
prompts of a step by the gradients of the output layer, or 16 prompts by those of all parameters.  `noise` is
the variance between responses to one prompt, relative to RLOO's, over all reports of all seeds; `auto` is
always measured with the weights fitted on earlier reports.  Times are not measured.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.record import write_record

from opo_megatron.updates.variance_report import relative_noise
from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
SEEDS, STEPS, EVERY = (1, 2, 3), 120, 4
PROMPTS = {"output_layer": 48, "all_parameters": 16}
PARTS = ("early", "middle", "late")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    results: dict[str, Any] = {"seeds": SEEDS, "steps": STEPS, "reports per run": STEPS // EVERY}
    for gradients in PROMPTS:
        results[gradients] = summarize([reports_of(seed, gradients) for seed in SEEDS])
        print(json.dumps({gradients: results[gradients]}, indent=2), flush=True)
    if not options.no_record:
        print(f"written to {write_record('variance', results)}")
    return 0


def reports_of(seed: int, gradients: str) -> list[dict[str, Any]]:
    """All reports of one run."""
    print(f"{gradients}, seed {seed} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.dir": f"{folder}/run",
            "run.seed": seed,
            "train.steps": STEPS,
            "eval.every_steps": 0,
            "eval.problems": 16,
            "observe.kl": "off",
            "algorithm.baseline": "auto",
            "algorithm.variance_every": EVERY,
            "algorithm.variance_of": gradients,
            "algorithm.variance_prompts": PROMPTS[gradients],
        }
        recipe = str(ROOT / "recipes" / "quickstart.yaml")
        overrides = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-m", "opo_megatron", "train", recipe, *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "variance/rloo" in row]


def summarize(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Noise over all reports, by third of the run and by seed; correlations; the mixture of auto."""
    all_reports = [row for run in runs for row in run]
    third = -(-len(runs[0]) // len(PARTS))
    thirds = {
        part: [row for run in runs for row in run[i * third : (i + 1) * third]]
        for i, part in enumerate(PARTS)
    }
    kinds = ("length", "energy", "energy_hidden")
    return {
        "noise": rounded(relative_noise(all_reports)),
        "noise by seed": [rounded(relative_noise(run)) for run in runs],
        "noise by part": {part: rounded(relative_noise(rows)) for part, rows in thirds.items()},
        "noise / signal of all estimators, group mean = 1": noise_to_signal(all_reports),
        "correlation of ‖∇log π‖² with": {
            part: {kind: round(mean_of(rows, f"variance/correlation_{kind}"), 2) for kind in kinds}
            for part, rows in thirds.items()
        },
        "mixture of auto": {
            part: {
                key.removeprefix("baseline/auto_"): round(mean_of(rows, key), 2)
                for key in all_reports[0]
                if key.startswith("baseline/auto_")
            }
            for part, rows in thirds.items()
        },
    }


def noise_to_signal(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Also for biased estimators; includes the variance between prompts."""
    names = [key.removeprefix("signal/") for key in rows[0] if key.startswith("signal/")]
    ratio = {
        name: sum(row[f"variance/{name}"] for row in rows) / sum(row[f"signal/{name}"] for row in rows)
        for name in names
    }
    return rounded({name: value / ratio["group_mean"] for name, value in ratio.items()})


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    return fmean(row[key] for row in rows if key in row)


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
