"""Trains a small MoE and its dense counterpart on the lift through SGLang servers → records/moe_lift.json

    python tools/record_moe_lift.py                       # about 25 minutes on two idle cores
    python tools/record_moe_lift.py --runs moe --no-record train.steps=5 warm_start.steps=20

The recipe is `recipes/quickstart_sglang.yaml` with 140 steps, in fp32.  Both models are Qwen3's; a token of
the MoE takes 2 of 8 experts, together as wide as the dense MLP.  `moe` replays the server's experts in
training and keeps to the recipe's tolerance, which is the dense model's.  `moe without replay` trains for 40
steps under a tolerance that nothing exceeds, for comparison.  Exit code 1 where a claim does not hold.
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
from statistics import fmean, median
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart_sglang.yaml"
COMMON = ("policy.model.qk_layernorm=true", "train.steps=140")
EXPERTS = (
    "policy.model.num_moe_experts=8",
    "policy.model.moe_router_topk=2",
    "policy.model.moe_ffn_hidden_size=176",  # half of the dense MLP's
)
RUNS: dict[str, tuple[str, ...]] = {
    "dense": COMMON,
    "moe": (*COMMON, *EXPERTS),
    "moe without replay": (
        *COMMON, *EXPERTS, "rollout.routing_replay=false", "on_policy.tolerance=10", "train.steps=40",
    ),
}  # fmt: skip
CLAIMS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "the MoE reaches 0.90": lambda r: r["moe"]["accuracy at the end"] >= 0.90,
    "the MoE is within 0.03 of the dense model": lambda r: (
        r["moe"]["accuracy at the end"] >= r["dense"]["accuracy at the end"] - 0.03
    ),
    "with replay no token exceeds the dense model's tolerance": lambda r: (
        r["moe"]["largest |Δ log π| of any token"] <= 1e-3
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="only these")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument(
        "--sglang-python", default=str(ROOT / ".venv-sglang" / "bin" / "python"), metavar="PYTHON",
        help="interpreter of SGLang's environment (default: that of `make setup-sglang`)",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to `opo train`")
    options = parser.parse_intermixed_args()
    own = [f"rollout.sglang.python={options.sglang_python}", *options.overrides]
    results = {name: run(name, own) for name in options.runs}
    print(json.dumps(results, indent=2))
    if options.no_record or set(results) != set(RUNS):
        return 0
    print(f"written to {write_record('moe_lift', results)}")
    missed = [claim for claim, holds in CLAIMS.items() if not holds(results)]
    for claim in missed:
        print(f"NOT MET: {claim}")
    return 1 if missed else 0


def run(name: str, overrides: list[str]) -> dict[str, Any]:
    """One whole `opo train` in its own process, start-up included."""
    print(f"{name} …", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={run_dir}"]
        started = time.monotonic()
        subprocess.run([*command, *RUNS[name], *overrides], check=True)
        seconds = time.monotonic() - started
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    updates = rows[1:]
    curve = {str(row["step"]): row["eval/accuracy"] for row in rows if "eval/accuracy" in row}
    return {
        "overrides": list(RUNS[name]),
        "seconds": seconds,
        "median seconds of a step": median(row["time/step"] for row in updates),
        "largest |Δ log π| of any token": max(row["on_policy/logprob_diff_max"] for row in updates),
        "mean |Δ log π|": fmean(row["on_policy/logprob_diff_mean"] for row in updates),
        "largest |Δ log π| of a probe": max(row["on_policy/sync_diff_max"] for row in rows),
        "steps above the tolerance": sum(row["on_policy/logprob_diff_max"] > 1e-3 for row in updates),
        "accuracy at the end": list(curve.values())[-1],
        "curve of eval/accuracy": curve,
    }


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
