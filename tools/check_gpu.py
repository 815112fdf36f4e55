"""Checks and benchmarks everything that needs a GPU: one JSON file, at most ten minutes.

    python tools/check_gpu.py                   # all sections → records/gpu.json
    python tools/check_gpu.py --device cpu      # the sections that a CPU can run; writes nothing

Every section runs in its own process with a time limit, so a failing section does not affect the others.
The sections of kernels (bench/gpu_kernels.py) have limits.  Training sections run the real command and report
the run's own metrics, as medians over the steps after the first.  Exit code 1 where a section failed or a
limit is not met, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu_kernels import KERNELS
from bench.record import write_record
from bench_sync import SIZES

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
SECTION_SECONDS = 120
STEPS = 4
OPTIONAL = ("transformer-engine", "triton", "apex", "flash-attn", "nvidia-modelopt", "liger-kernel")

TRAINING = {
    "policy in bf16, local engine": ("rollout.engine=local",),
    "policy in FP8 by Transformer Engine, local engine": ("rollout.engine=local", "policy.fp8=blockwise"),
    "packed sequences, local engine": ("rollout.engine=local", "policy.packing=thd"),
    "half of the optimizer in host memory": ("rollout.engine=local", "policy.optimizer_offload=0.5"),
    "shared GPU, SGLang by CUDA IPC": ("rollout.engine=sglang", "rollout.sglang.transport=tensor"),
    "shared GPU, SGLang by broadcast": ("rollout.engine=sglang", "rollout.sglang.transport=distributed"),
}
FIGURES = (
    "time/rollout", "time/train", "time/sync", "time/step", "throughput/train_tokens_per_second",
    "throughput/rollout_tokens_per_second", "on_policy/sync_diff_max", "on_policy/logprob_diff_max",
    "on_policy/logprob_diff_mean", "on_policy/k3", "on_policy/ess", "memory/rollout_peak_gpu_gib",
    "memory/train_peak_gpu_gib", "memory/sync_peak_gpu_gib",
)  # fmt: skip
MODEL = SIZES["200M"]
PEAK_TFLOPS = 989.0
"""Dense bf16 peak of an H100 SXM, by its data sheet; the MFU of FP8 runs uses it too."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--section", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        print(json.dumps(LIBRARIES[options.section]()))
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: torch sees no GPU; run this on a machine with one, or pass --device cpu",
            file=sys.stderr,
        )
        return 2
    results: dict[str, Any] = {"versions": versions(), "sections": {}}
    for name in LIBRARIES:
        results["sections"][name] = section(name, lambda name=name: in_subprocess(name))  # type: ignore[misc]
    for name, overrides in TRAINING.items():
        if reason := lacks(overrides, options.device):
            results["sections"][name] = {"missing": reason}
            continue
        results["sections"][name] = section(name, lambda o=overrides: run(o, options.device))  # type: ignore[misc]
    print(json.dumps(results, indent=2))
    if options.device == "cuda":
        print(f"written to {write_record('gpu', results)}")
    failed = [name for name, result in results["sections"].items() if "failed" in result]
    for name in failed:
        print(f"FAILED: {name}: {results['sections'][name]['failed']}")
    missed = {name: result["not met"] for name, result in results["sections"].items() if "not met" in result}
    for name, lines in missed.items():
        print(f"NOT MET: {name}: {'; '.join(lines)}")
    return 1 if failed or missed else 0


def section(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The section's results, or why it failed or was skipped."""
    print(f"{name} …", flush=True)
    started = time.monotonic()
    try:
        result = work()
    except subprocess.TimeoutExpired:
        result = {"failed": f"timed out after {SECTION_SECONDS} seconds"}
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        result = {
            "failed": lines[-1] if lines else f"exit code {error.returncode}",
            "last lines": lines[-20:],
        }
    return result | {"seconds": round(time.monotonic() - started, 1)}


def in_subprocess(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--section", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECTION_SECONDS, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---------------------------------------------------------------------- versions and libraries


def versions() -> dict[str, Any]:
    """Package versions of both environments; None where a package is missing."""
    import torch

    result: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in OPTIONAL:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = f"{torch.cuda.device_count()} × {properties.name}"
        result["gpu memory, GiB"] = round(properties.total_memory / 2**30, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    python = ROOT / ".venv-sglang" / "bin" / "python"
    result["sglang"] = None
    if python.exists():
        code = "import importlib.metadata as m; print(m.version('sglang'), m.version('torch'))"
        output = subprocess.run([str(python), "-c", code], capture_output=True, text=True).stdout.split()
        result["sglang"] = dict(zip(("sglang", "torch"), output, strict=False))
    return result


def transformer_engine() -> dict[str, Any]:
    """One linear layer in bf16 against torch, and whether the GPU supports FP8."""
    if importlib.util.find_spec("transformer_engine") is None:
        return {"missing": "transformer_engine is not installed; policies use the local layer spec"}
    import torch
    import transformer_engine.pytorch as te

    layer = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    difference = (layer(x).float() - x.float() @ layer.weight.float().T).abs().max()
    fp8, reason = te.fp8.check_fp8_support()
    return {"largest difference": float(difference), "fp8": bool(fp8), "reason": reason}


def triton() -> dict[str, Any]:
    """Whether Triton compiles and runs a kernel."""
    if importlib.util.find_spec("triton") is None:
        return {"missing": "triton is not installed; kernels run as torch code"}
    import torch

    if not torch.cuda.is_available():
        return {"missing": "no GPU to run a kernel on"}

    @torch.compile
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * 2 + 1

    x = torch.randn(2**20, device="cuda")
    return {"largest difference": float((scaled(x) - (torch.sin(x) * 2 + 1)).abs().max())}


LIBRARIES: dict[str, Callable[[], dict[str, Any]]] = {
    "transformer engine": transformer_engine,
    "triton": triton,
    **KERNELS,
}

# ---------------------------------------------------------------------- training runs


def lacks(overrides: tuple[str, ...], device: str) -> str | None:
    """Why a section cannot run, or None: FP8 and optimizer offload need a GPU and Transformer Engine."""
    if not any("fp8" in key or "offload" in key for key in overrides):
        return None
    if device == "cpu":
        return "FP8 and optimizer offload need a GPU"
    if importlib.util.find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    return None


def mfu(config: Path, tokens_per_second: float) -> float:
    """6 × parameters × tokens/s over the peak: a lower bound, attention FLOPs excluded."""
    from opo_megatron.config import load_config
    from opo_megatron.weights.param_mapping import Stages, parameters

    model = load_config(config).policy.model
    mapping = parameters(model, model.vocab_size or 0, Stages(model.num_layers))
    return 6 * sum(parameter.numel for parameter in mapping) * tokens_per_second / (PEAK_TFLOPS * 1e12)


def run(overrides: tuple[str, ...], device: str) -> dict[str, Any]:
    """A few steps in bf16 with 200 million parameters (on a CPU: the quickstart's model)."""
    recipe = ROOT / "recipes" / "quickstart_sglang.yaml"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "opo_megatron", "train", str(recipe)]
        command += [f"run.dir={folder}/run", f"policy.device={device}", "policy.dtype=bf16", *overrides]
        command += ["warm_start.steps=20", f"train.steps={STEPS}", "eval.every_steps=0", "eval.problems=16"]
        # Engine and policy round bf16 differently: report the difference, do not stop the run.
        command += ["on_policy.action=warn", "on_policy.tolerance=1.0"]
        if device == "cuda":
            command += [f"policy.model.{key}={value}" for key, value in MODEL.items() if key != "vocab_size"]
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECTION_SECONDS, check=True)
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
        rows = rows[2:]
        result = {name: statistics.median(row[name] for row in rows) for name in FIGURES if name in rows[0]}
        if device == "cuda":
            result["mfu"] = mfu(
                Path(folder, "run", "config.yaml"), result["throughput/train_tokens_per_second"]
            )
    return result


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
