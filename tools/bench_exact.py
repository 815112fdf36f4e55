"""Benchmarks exact mode, with both engines → records/exact.json

python tools/bench_exact.py                  # four whole quickstarts, and rollouts of two sizes of model
python tools/bench_exact.py --steps 20       # shorter ones; prints only
python tools/bench_exact.py --engine local   # one engine; prints only
python tools/bench_exact.py --device cuda    # on a GPU → records/exact_gpu.json

Whole runs of the quickstart with and without exact mode, on one thread, one after the other, from the same
seed.  Rounding makes them diverge after some steps, so times are also given per thousand response tokens.
Then rollouts alone (`bench/exact_rollouts.py`).  Exit code 1 where a requirement is not met.

On a GPU: every kernel beside cuBLAS, Transformer Engine's attention and PyTorch (`bench/exact_kernels.py`),
and whole steps beside the usual mode (`bench/gpu_exact.py`).  Exit code 2 without a GPU.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.exact_kernels import SHAPES, kernel_times
from bench.exact_rollouts import tokens_per_second
from bench.gpu_exact import EXACT_SECTIONS
from bench.gpu_section import Setting
from bench.record import write_record
from bench_loop import PHASES, ROOT, phases, rows_of

from opo_megatron.utils.terminal import prepare_terminal

RECIPES = {"local": "quickstart.yaml", "sglang": "quickstart_sglang.yaml"}
HIDDEN_SIZES = (128, 768)
STEP, MANY, ONE = 1.2, 1.25, 2.0
"""How many times the usual time a step may take, and the rollout of 48 requests and of one at hidden 768."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, metavar="N", help="number of OPO steps; writes no record")
    parser.add_argument("--engine", choices=RECIPES, help="measure only this engine; writes no record")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--sglang-python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), help="with --device cuda"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="of each rollout; default 5")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        return on_gpu(arguments.sglang_python)
    engines = [arguments.engine] if arguments.engine else list(RECIPES)
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {
            engine: quickstarts(Path(folder), engine, arguments.steps) for engine in engines
        }
        results["tokens/s of rollouts"] = {
            f"hidden {hidden}": tokens_per_second(
                ROOT / "recipes" / "quickstart.yaml", Path(folder) / str(hidden), hidden, arguments.repeats
            )
            for hidden in HIDDEN_SIZES
        }
    print(json.dumps(results, indent=2))
    if arguments.steps is None and arguments.engine is None:
        print(f"written to {write_record('exact', results)}")
    missed = [claim for engine in engines for claim in unmet(results, engine)]
    for claim in missed:
        print(f"NOT MET: {claim}")
    return 1 if missed else 0


def on_gpu(sglang_python: str) -> int:
    """Kernels, then whole steps of both modes."""
    import torch

    if not torch.cuda.is_available():
        print("error: --device cuda, but torch sees no GPU; run this on a machine with one", file=sys.stderr)
        return 2
    if importlib.util.find_spec("transformer_engine") is None:
        print(
            "error: --device cuda compares with Transformer Engine's attention, which is not installed; "
            "install transformer_engine[pytorch]",
            file=sys.stderr,
        )
        return 2
    results: dict[str, Any] = {"GPU": torch.cuda.get_device_name()}
    results |= {f"kernels: {name}": kernel_times(shape) for name, shape in SHAPES.items()}
    torch.cuda.empty_cache()
    missed = []
    for section in EXACT_SECTIONS:
        with tempfile.TemporaryDirectory() as folder:
            results[section.name] = section.run(Setting("cuda", Path(folder), sglang_python))
        missed += [f"{section.name}: {line}" for line in results[section.name].get("not met", [])]
    print(json.dumps(results, indent=2))
    print(f"written to {write_record('exact_gpu', results)}")
    for line in missed:
        print(f"NOT MET: {line}")
    return 1 if missed else 0


def unmet(results: dict[str, Any], engine: str) -> list[str]:
    """The requirements that an engine misses."""
    runs, rollouts = results[engine], results["tokens/s of rollouts"]["hidden 768"]

    def ratio(case: str) -> float:
        return float(rollouts[case][f"{engine}, usual"] / rollouts[case][f"{engine}, exact"])

    differences = runs["exact"]["largest |Δ log π| of every step"]
    step = runs["exact / usual"]["seconds of a step"]
    requirements = {
        f"every step is exact; the largest difference is {max(differences, default=None)}": (
            bool(differences) and set(differences) == {0.0}
        ),
        "without exact mode there is a difference to remove": (
            max(runs["usual"]["largest |Δ log π| of every step"]) > 0
        ),
        f"a step takes at most {STEP} times the usual; it takes {step:.2f}": step <= STEP,
        f"48 requests at hidden 768: at most {MANY} times; {ratio('48 × 60'):.2f}": ratio("48 × 60") <= MANY,
        f"one request at hidden 768: at most {ONE} times; {ratio('1 × 60'):.2f}": ratio("1 × 60") <= ONE,
    }
    return [f"{engine}: {claim}" for claim, holds in requirements.items() if not holds]


def quickstarts(folder: Path, engine: str, steps: int | None) -> dict[str, Any]:
    """A quickstart in each mode, and the ratio of their times per response token."""
    exact = (f"rollout.{engine}.exact=true", "on_policy.tolerance=0")
    result: dict[str, Any] = {
        mode: measure(folder / engine / mode, RECIPES[engine], settings, steps)
        for mode, settings in (("exact", exact), ("usual", ()))
    }
    result["exact / usual"] = {name: ratio(result, name) for name in ("seconds of a step", *PHASES)}
    return result


def measure(run: Path, recipe: str, settings: tuple[str, ...], steps: int | None) -> dict[str, Any]:
    """One quickstart by `opo train`."""
    command = [sys.executable, "-m", "opo_megatron", "train", str(ROOT / "recipes" / recipe)]
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


def ratio(result: dict[str, Any], name: str) -> float:
    exact, usual = (
        result[mode]["median seconds per 1000 response tokens"][name] for mode in ("exact", "usual")
    )
    return float(exact / usual)


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
