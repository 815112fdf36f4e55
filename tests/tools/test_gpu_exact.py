"""Sections of check_gpu.py for exact mode: their runs, what they find not met, and, on a CPU, themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import gpu_exact
from bench.gpu_exact import EXACT_SECTIONS, LARGEST, MODELS, judged, overrides
from bench.gpu_runs import RECIPE, overrides_of
from bench.gpu_section import Setting

from opo_megatron.config import load_config
from opo_megatron.rollout.sglang.exact_mode import options
from tests.support.servers import sglang_python

SECONDS = 300


def test_together_they_take_five_minutes_at_most() -> None:
    assert sum(section.seconds for section in EXACT_SECTIONS) <= SECONDS
    assert all(section.alone and not section.by_default for section in EXACT_SECTIONS)


@pytest.mark.parametrize("mode", ["exact", "usual"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("model", MODELS)
def test_their_runs_are_recipes_that_load(model: str, device: str, mode: str, tmp_path: Path) -> None:
    setting = Setting(device, tmp_path, "/other/python", ("grammar_backend=none",))
    every = overrides_of(setting, overrides(model, setting.on_gpu, mode))
    config = load_config(RECIPE, [f"run.dir={tmp_path}", *every], 1)
    assert config.rollout.sglang.exact is (mode == "exact") and config.policy.dtype.value == "bf16"
    if device == "cuda":
        assert config.policy.model.num_layers == MODELS[model]["num_layers"]
        assert not config.rollout.sglang.options["disable_cuda_graph"]
        assert options(config, on_gpu=True)["cuda-graph-backend-prefill"] == "disabled"


def figures(step: float = 1.2, decode: float = 0.8, largest: float = 0.0, **others: Any) -> dict[str, Any]:
    times = {"time/step": (step, 1.0), "throughput/rollout_tokens_per_second": (1000 * decode, 1000.0)}
    exact = {f"exact: {name}": pair[0] for name, pair in times.items()}
    usual = {f"usual: {name}": pair[1] for name, pair in times.items()}
    return exact | usual | {f"exact: {LARGEST}": largest, f"usual: {LARGEST}": 0.1} | others


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (figures(), []),
        (figures(step=1.5, decode=0.6), []),
        (figures(step=1.51), ["a step takes 1.51 times as long, at most 1.5"]),
        (figures(decode=0.59), ["rollouts have 0.59 of the usual tokens/s, at least 0.6"]),
        (figures(decode=float("nan")), ["rollouts have nan of the usual"]),
        (figures(largest=1e-6), ["largest |Δ log π| is 1e-06, at most 0"]),
        (figures(largest=float("nan")), ["largest |Δ log π| is nan"]),
        (figures(2.0, 0.5, 1e-3), ["is 0.001", "2.00 times", "0.50 of the usual"]),
    ],
)  # fmt: skip
def test_what_is_not_met_is_said(found: dict[str, Any], words: list[str]) -> None:
    lines = judged(found, on_gpu=True).get("not met", [])
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))
    on_cpu = judged(found, on_gpu=False).get("not met", [])
    assert on_cpu == [line for line in lines if "|Δ" in line]


REFUSED = (
    "error: rollout.sglang.exact=true, but {} engine and policy differ by 1.2e-06 in a token's\n"
    "log-probability on this machine, first in {}, so exactness cannot be claimed; set"
)


@pytest.mark.parametrize(
    "operation",
    [
        "the attention of layer 1",
        "the LM head",
        "the sampler, which records other log-probabilities than those of its logits",
        "the CUDA graphs of decoding, without which they are equal",
        "an operation whose rows depend on the others of their batch",
    ],
)
def test_a_run_that_differs_gives_the_first_operation(
    operation: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(model: str, setting: Setting, mode: str) -> dict[str, float]:
        if mode == "exact":
            raise RuntimeError(REFUSED.format("three requests at once", operation))
        return {LARGEST: 0.1, "time/step": 1.0}

    monkeypatch.setattr(gpu_exact, "measured", measured)
    result = EXACT_SECTIONS[0].run(Setting("cuda", tmp_path, "python"))
    assert result["first operation that differs"] == operation and result["usual: time/step"] == 1.0
    assert result["not met"] == [f"largest |Δ log π| is 1.2e-06, at most 0; first in {operation}"]


def test_another_failure_is_the_sections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(model: str, setting: Setting, mode: str) -> dict[str, float]:
        raise RuntimeError("the run ended with exit code 2")

    monkeypatch.setattr(gpu_exact, "measured", fail)
    with pytest.raises(RuntimeError, match=r"ended with exit code 2"):
        EXACT_SECTIONS[0].run(Setting("cpu", tmp_path, "python"))


@pytest.mark.slow
def test_a_section_runs_on_a_cpu(tmp_path: Path) -> None:
    result = EXACT_SECTIONS[0].run(Setting("cpu", tmp_path, sglang_python(), ("grammar_backend=none",)))
    assert result[f"exact: {LARGEST}"] == 0 < result[f"usual: {LARGEST}"] and "not met" not in result
    assert result["step, exact / usual"] > 0
