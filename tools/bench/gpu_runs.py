"""Training runs as sections of check_gpu.py: the real command, in a process of its own, and its own metrics.

    figures = train(setting, "disk", ["rollout.sglang.transport=disk"])

The recipe is the SGLang quickstart, with a model of 150 million parameters on a GPU, and its own on a CPU.
Figures are medians over the steps after the first, which compiles and allocates.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_section import Figures, Setting

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "recipes" / "quickstart_sglang.yaml"
STEPS = 4
SMALL = {
    "num_layers": 14,
    "hidden_size": 1024,
    "ffn_hidden_size": 2816,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 128,
}
"""`policy.model` on a GPU: all sides are multiples of 128, as FP8 on both sides needs."""
QUICK = (
    "policy.dtype=bf16",
    "warm_start.steps=20",
    "eval.every_steps=0",
    "eval.problems=16",
    "checkpoint.at_end=false",
    "observe.tensorboard=false",
    "checkpoint.at_end=false",  # gigabytes, by several runs at once
    # Engine and policy round differently: the difference is reported, and the run continues.
    "on_policy.action=warn",
    "on_policy.tolerance=1.0",
)
SEVERAL_SERVERS = (
    "rollout.sglang.options.max_total_tokens=65536",  # by default a server takes the whole GPU for its cache
    "rollout.sglang.options.mem_fraction_static=0.9",
    "rollout.sglang.options.disable_cuda_graph=true",  # capturing takes longer than these few steps
)
"""Options with which several servers start side by side on one GPU."""
FIGURES = (
    *("time/rollout", "time/train", "time/sync", "time/step", "run/engine_failures"),
    *("throughput/train_tokens_per_second", "throughput/rollout_tokens_per_second"),
    *("on_policy/sync_diff_max", "on_policy/logprob_diff_max", "on_policy/logprob_diff_mean"),
    *("on_policy/k3", "on_policy/ess", "entropy", "grad_norm"),
)
"""Metrics that are reported where the run has them, with memory/ on a GPU.  Not the engine's memory: that is
what else is in use there, which other sections use too."""
LAST_LINES = 12

Act = Callable[[Path], None]


def overrides_of(setting: Setting, overrides: Sequence[str] = ()) -> list[str]:
    """Of the recipe, for this machine; the later ones win."""
    device = [f"policy.device={setting.device}"]
    model = [f"policy.model.{key}={value}" for key, value in SMALL.items()] if setting.on_gpu else []
    servers = SEVERAL_SERVERS if setting.on_gpu else ()
    return [*QUICK, *device, *model, *servers, *setting.sglang, *overrides]


def train(
    setting: Setting,
    name: str,
    overrides: Sequence[str] = (),
    steps: int = STEPS,
    act: Act | None = None,
) -> Figures:
    """Train for a few steps.

    Args:
        name: of the run's folder.
        act: called in a thread with the run's folder, while the run lasts.

    Raises:
        RuntimeError: with the last lines of the run and of its servers, where it fails.
    """
    run_dir = setting.folder / name
    command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={run_dir}"]
    command += [f"train.steps={steps}", *overrides_of(setting, overrides)]
    output = setting.folder / f"{name}.log"
    with output.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        if act is not None:
            threading.Thread(target=act, args=(run_dir,), daemon=True).start()
        code = process.wait()
    if code != 0:
        tails = [tail(path) for path in (*sorted(run_dir.glob("sglang/*.log")), output)]
        raise RuntimeError("\n".join([*tails, f"the run ended with exit code {code}"]))
    return medians(metrics_of(run_dir))


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; none before the first step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def medians(rows: Sequence[dict[str, Any]]) -> Figures:
    """Medians of the steps after the first; counts are those of the last."""
    steps = [row for row in rows if row["step"] > 0]
    steps = steps[1:] or steps
    names = [n for n in steps[-1] if n in FIGURES or re.match("memory/(?!engine_)", n)]
    figures = {name: statistics.median(row[name] for row in steps if name in row) for name in names}
    return figures | {"run/engine_failures": steps[-1]["run/engine_failures"], "steps": len(steps)}


def tail(path: Path) -> str:
    """The last lines of a log."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join([f"{path.name}:", *lines[-LAST_LINES:]])
