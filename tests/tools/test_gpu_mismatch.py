"""Sections of check_gpu.py that explain the mismatch of engine and policy."""

from __future__ import annotations

from pathlib import Path

import explain_mismatch
import pytest
from bench.gpu_mismatch import MISMATCH_SECTIONS, overrides_of
from bench.gpu_section import Setting

from opo_megatron.config import load_config


@pytest.mark.parametrize(
    ("engine", "device", "options"),
    [
        ("local", "cpu", ()),
        ("local", "cuda", ()),
        ("sglang", "cpu", ()),
        ("sglang", "cuda", ()),
        ("sglang", "cuda", ("attention_backend=triton", "grammar_backend=none")),
    ],
)
def test_the_tools_recipe_loads_on_every_device(
    engine: str, device: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = overrides_of(engine, Setting(device, tmp_path, "/other/python", options))
    every = [f"run.dir={tmp_path}", "policy.dtype=bf16", f"rollout.engine={engine}"]
    every += [f"policy.model.{one}" for one in explain_mismatch.SMALL]
    config = load_config(explain_mismatch.RECIPE, [*every, *overrides], 1)
    assert config.rollout.engine.value == engine and config.policy.device.value == device
    given = dict(option.split("=") for option in options)
    assert given.items() <= config.rollout.sglang.options.items()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_tables_are_figures(tmp_path: Path) -> None:
    figures = MISMATCH_SECTIONS[0].run(Setting("cpu", tmp_path, "python"))
    assert figures["mean |Δ log π|, all parts in fp32 − float64"] < 1e-4
    assert len(figures["layers"]) == 8 and len(figures["parts"]) == 7
