"""Parallel layouts on one GPU, against one rank on it: sections of check_gpu.py.

Each runs `check_layouts.py` with Transformer Engine's layers, as 2 or 4 ranks that share the card.  On a CPU,
which has neither Transformer Engine nor FP8, a few layouts run in fp32 with the same process group.
"""

from __future__ import annotations

import functools
import importlib.util

from bench.gpu_section import Figures, Section, Setting

LAYOUTS = {
    "2 ranks": ("tp2", "tp2+sp", "pp2", "pp2vpp2", "dp2", "cp2", "moe-ep2", "moe-tp2sp-ep2"),
    "4 ranks": ("tp2pp2+sp", "packed-tp2pp2vpp2+sp", "cp4", "tp2cp2+sp", "cp2pp2vpp2"),
    "experts, bf16": (
        "moe-replay-ep2-recompute", "moe-replay-packed-tp2sp-ep2", "moe-replay-cp2-ep2", "moe-replay-pp2vpp2",
    ),
    "experts, FP8": ("moe-ep2", "moe-tp2sp-ep2", "packed-moe-tp2sp-ep2"),
    "2 and 4 ranks": (
        "unfused-gradients", "tp2", "packed-tp2+sp", "pp2vpp2", "packed-dp2", "cp2", "tp2pp2+sp", "tp2cp2+sp",
    ),
}  # fmt: skip
ON_CPU = {
    "2 ranks": ("tp2+sp", "pp2vpp2", "moe-ep2"),
    "4 ranks": ("cp2dp2",),
    "experts, bf16": ("moe-replay-ep2-recompute",),
}


def layouts(group: str, precision: str, setting: Setting) -> Figures:
    """Differences of every layout of a group; those beyond the tolerance are not met."""
    import check_layouts
    from check_layouts import Machine, tolerances

    if setting.on_gpu and importlib.util.find_spec("transformer_engine") is None:
        return {"missing": "transformer_engine is not installed, whose layers these layouts are to check"}
    names = (LAYOUTS if setting.on_gpu else ON_CPU).get(group)
    if not names:
        return {"missing": "FP8 needs a GPU"}
    precision = precision if setting.on_gpu else "fp32"
    machine = Machine(setting.device, precision, staged=True, ties=("untied",))
    results = check_layouts.measure(list(names), machine)
    figures: Figures = {"precision": precision}
    missed = []
    for name in names:
        loss, norm = check_layouts.differences(name, "untied", results)
        figures[name] = {"|Δ loss| or |Δ log π|": loss, "|Δ grad norm| / grad norm": norm}
        most_loss, most_norm = tolerances(name, precision)
        if not (loss <= most_loss and norm <= most_norm):
            missed.append(
                f"{name} differs from one rank by {loss:.2g} in the loss or log π, {norm:.2g} in its gradient"
            )
    return figures | ({"not met": missed} if missed else {})


LAYOUT_SECTIONS = [
    Section("layouts of 2 ranks, bf16", 120, functools.partial(layouts, "2 ranks", "bf16")),
    Section("layouts of 4 ranks, bf16", 120, functools.partial(layouts, "4 ranks", "bf16")),
    Section("layouts in FP8", 120, functools.partial(layouts, "2 and 4 ranks", "fp8")),
]
