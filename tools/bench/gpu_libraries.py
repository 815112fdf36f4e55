"""What is installed, and whether Transformer Engine and Triton work on this GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
from typing import Any

from bench.gpu_section import Figures, Section, Setting

PACKAGES = (
    "transformer-engine", "megatron-core", "triton", "apex", "flash-attn", "nvidia-modelopt", "liger-kernel",
)  # fmt: skip


def versions(setting: Setting) -> dict[str, Any]:
    """Package versions of both environments, card and driver; None where something is missing."""
    import torch

    result: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = f"{torch.cuda.device_count()} × {properties.name}"
        result["gpu memory, GiB"] = round(properties.total_memory / 2**30, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        result["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    result["sglang"] = None
    if os.access(setting.sglang_python, os.X_OK):
        code = "import importlib.metadata as m; print(m.version('sglang'), m.version('torch'))"
        command = [setting.sglang_python, "-c", code]
        output = subprocess.run(command, capture_output=True, text=True).stdout.split()
        result["sglang"] = dict(zip(("sglang", "torch"), output, strict=False))
    return result


def transformer_engine(setting: Setting) -> Figures:
    """One linear layer in bf16 against torch, and whether the GPU supports FP8 by blocks."""
    if importlib.util.find_spec("transformer_engine") is None:
        return {"missing": "transformer_engine is not installed; policies use the local layer spec"}
    if not setting.on_gpu:
        return {"missing": "Transformer Engine has no CPU code"}
    import torch
    import transformer_engine.pytorch as te

    layer = te.Linear(256, 256, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    difference = (layer(x).float() - x.float() @ layer.weight.float().T).abs().max()
    fp8, reason = te.is_fp8_block_scaling_available(return_reason=True)
    return {"largest difference": float(difference), "fp8 by blocks": bool(fp8), "reason": reason}


def triton(setting: Setting) -> Figures:
    """Whether Triton compiles and runs a kernel."""
    if importlib.util.find_spec("triton") is None:
        return {"missing": "triton is not installed; kernels run as torch code"}
    if not setting.on_gpu:
        return {"missing": "no GPU to run a kernel on"}
    import torch

    @torch.compile
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * 2 + 1

    x = torch.randn(2**20, device="cuda")
    return {"largest difference": float((scaled(x) - (torch.sin(x) * 2 + 1)).abs().max())}


LIBRARY_SECTIONS = [
    Section("library: Transformer Engine", 30, transformer_engine),
    Section("library: Triton", 40, triton),
]
