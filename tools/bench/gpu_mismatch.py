"""Where bf16's mismatch comes from, on this device: sections of check_gpu.py that run explain_mismatch.py."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

from bench.gpu_runs import SEVERAL_SERVERS
from bench.gpu_section import Figures, Section, Setting

TOOL = Path(__file__).parents[1] / "explain_mismatch.py"


def explained(engine: str, setting: Setting) -> Figures:
    """The tables of explain_mismatch.py: pairs of log-probabilities, layers, and parts of the model."""
    command = [sys.executable, str(TOOL), "--engine", engine, "--records", str(setting.folder)]
    subprocess.run([*command, *overrides_of(engine, setting)], check=True)
    results: Figures = json.loads((setting.folder / f"mismatch_{engine}.json").read_text())["results"]
    pairs = {f"mean |Δ log π|, {pair}": row["mean"] for pair, row in results["log-probabilities"].items()}
    return pairs | {name: results[name] for name in ("log-probabilities", "layers", "parts")}


def overrides_of(engine: str, setting: Setting) -> list[str]:
    """Of the tool's recipe, for this machine."""
    device = f"policy.device={setting.device}"
    if engine == "local":
        return [device]
    return [device, *(SEVERAL_SERVERS if setting.on_gpu else ()), *setting.sglang]


MISMATCH_SECTIONS = [
    Section("mismatch by layer and part: local engine", 120, functools.partial(explained, "local")),
    Section("mismatch by layer and part: SGLang", 150, functools.partial(explained, "sglang")),
]
