"""Measures gradient variance by baseline, and the weights of `auto` → records/variance[_TASK].json

    python tools/bench_variance.py                     # the quickstart: three seeds, two kinds of gradients
    python tools/bench_variance.py --task hard_lift    # a model of 10 M parameters, a harder lift
    python tools/bench_variance.py --task long_tail    # responses of 3 to 60 tokens to the same prompt
    python tools/bench_variance.py --seeds 1 --steps 8 --no-record

Whole runs with `baseline=auto`, whose reports measure every estimator on the same samples: all 48 prompts of
a step by the gradients of the output layer, or 16 prompts by those of all parameters.  `noise` is the
variance between responses to one prompt, relative to RLOO's, over all reports of all seeds, with a 95 %
bootstrap interval over reports; `auto` is always measured with the weights fitted on earlier reports, and
`james_stein` shrinks towards the other measured prompts.  Times are not measured.
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

from opo_megatron.observe.gradient_noise import noise_intervals, relative_noise, variance_reports
from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
STEPS, EVERY = 120, 4
PROMPTS = {"output_layer": 48, "all_parameters": 16}
PARTS = ("early", "middle", "late")
MODEL_10M = {
    "policy.model.num_layers": 6,
    "policy.model.hidden_size": 384,
    "policy.model.ffn_hidden_size": 1024,
    "policy.model.num_attention_heads": 6,
}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "quickstart": ("quickstart.yaml", {}),
    "hard_lift": ("hard_lift.yaml", MODEL_10M | {"warm_start.lr": 1e-3}),
    "long_tail": (
        "quickstart.yaml",
        {
            "task.options.moves": 12,
            "policy.model.max_sequence_length": 96,
            "rollout.max_response_tokens": 60,
        },
    ),
}
"""Recipe, and what differs from it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, default="quickstart", help="default: quickstart")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"OPO steps of a run (default: {STEPS})")
    parser.add_argument("--warm-steps", type=int, help="steps of the warm start (default: the recipe's)")
    parser.add_argument("--gradients", choices=PROMPTS, nargs="+", default=[*PROMPTS], help="default: both")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    recipe, settings = TASKS[options.task]
    settings = settings | {"train.steps": options.steps}
    if options.warm_steps is not None:
        settings["warm_start.steps"] = options.warm_steps
    seeds = range(1, options.seeds + 1)
    results: dict[str, Any] = {
        "task": options.task,
        "recipe": recipe,
        "settings": settings,
        "seeds": [*seeds],
        "steps": options.steps,
        "reports per run": options.steps // EVERY,
    }
    for gradients in options.gradients:
        results[gradients] = summarize([reports_of(recipe, settings, seed, gradients) for seed in seeds])
        print(json.dumps({gradients: results[gradients]}, indent=2), flush=True)
    if not options.no_record:
        name = "variance" if options.task == "quickstart" else f"variance_{options.task}"
        print(f"written to {write_record(name, results)}")
    return 0


def reports_of(recipe: str, task: dict[str, Any], seed: int, gradients: str) -> list[dict[str, Any]]:
    """All reports of one run."""
    print(f"{gradients}, seed {seed} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = task | {
            "run.dir": f"{folder}/run",
            "run.seed": seed,
            "eval.every_steps": 0,
            "eval.problems": 16,
            "observe.kl": "off",
            "algorithm.baseline": "auto",
            "algorithm.variance_every": EVERY,
            "algorithm.variance_of": gradients,
            "algorithm.variance_prompts": PROMPTS[gradients],
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        path = str(ROOT / "recipes" / recipe)
        command = [sys.executable, "-m", "opo_megatron", "train", path, *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return variance_reports(rows)


def summarize(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Noise over all reports, by third of the run and by seed; correlations; the mixture of auto."""
    all_reports = [row for run in runs for row in run]
    third = -(-len(runs[0]) // len(PARTS))
    parts = {
        part: [row for run in runs for row in run[i * third : (i + 1) * third]]
        for i, part in enumerate(PARTS)
    }
    thirds = {part: rows for part, rows in parts.items() if rows}  # a short run has fewer
    kinds = ("length", "energy", "energy_hidden")
    return {
        "noise": rounded(relative_noise(all_reports)),
        "95 % interval of the noise": {
            name: [round(noise.low, 3), round(noise.high, 3)]
            for name, noise in noise_intervals(all_reports).items()
        },
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
