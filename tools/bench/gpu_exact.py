"""Exact mode on a GPU against the usual one: sections of check_gpu.py.

    python tools/check_gpu.py --only exact

Four steps of training with SGLang, which decodes in CUDA graphs, in bf16: first in exact mode, then in the
usual one, with the same recipe.  Where a bit differs, the test at the start of the run names the first
operation that does, and the section's result holds it.  On a CPU the same with the quickstart's model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace

from bench.gpu_runs import metrics_of, train
from bench.gpu_section import Figures, Section, Setting
from bench.gpu_training import LARGE, VOCABULARY

STEPS = 4
MODELS: dict[str, dict[str, object]] = {
    "1.35 G parameters": {**LARGE, "vocab_size": VOCABULARY},
    "Qwen3-0.6B's shape": {
        "num_layers": 28, "hidden_size": 1024, "ffn_hidden_size": 3072, "num_attention_heads": 16,
        "num_query_groups": 8, "kv_channels": 128, "max_sequence_length": 2048, "vocab_size": 151936,
        "qk_layernorm": True, "tie_embeddings": True, "rotary_base": 1000000,
    },
}  # fmt: skip
"""`policy.model` on a GPU."""
ON_GPU = (
    "policy.packing=thd",
    "policy.max_tokens_per_micro_batch=16384",
    "rollout.prompts_per_step=32",
    "rollout.samples_per_prompt=8",
    "rollout.max_response_tokens=381",
    "rollout.sglang.transport=tensor",
    "rollout.sglang.options.max_total_tokens=131072",
    "rollout.sglang.options.disable_cuda_graph=false",
    "rollout.sglang.options.cuda_graph_bs_decode=[1,8,64,128,256]",  # each takes time to capture
)
BOTH = ("warm_start.steps=0", "eval.problems=2", "observe.kl=off")
EXACT = ("rollout.sglang.exact=true",)
CHOSEN = ("attention_backend", "sampling_backend", "attention-backend", "sampling-backend")
"""Options of the servers that exact mode chooses itself."""
DIFFERS = re.compile(r"differ by (\S+) in a token's log-probability on this machine, first in (.+?), so")
TIMES = ("time/step", "time/rollout", "time/train", "throughput/rollout_tokens_per_second")
LARGEST = "largest |Δ log π|"
MOST_STEP, LEAST_DECODE = 1.5, 0.6
"""How many times the usual time a step may take, and the usual tokens per second a rollout must have."""


def exact_and_usual(model: str, setting: Setting) -> Figures:
    """Differences and times of both modes, and their ratios."""
    figures: Figures = {}
    try:
        figures |= {f"exact: {name}": value for name, value in measured(model, setting, "exact").items()}
    except RuntimeError as error:
        found = DIFFERS.search(" ".join(str(error).split()))
        if found is None:
            raise
        figures[f"exact: {LARGEST}"] = float(found[1])
        figures["first operation that differs"] = found[2]
    figures |= {f"usual: {name}": value for name, value in measured(model, setting, "usual").items()}
    return judged(figures, setting.on_gpu)


def measured(model: str, setting: Setting, mode: str) -> Figures:
    """One run: the largest difference of any step, and medians of the steps after the first."""
    if mode == "exact":
        kept = (one for one in setting.sglang_options if one.partition("=")[0] not in CHOSEN)
        setting = replace(setting, sglang_options=tuple(kept))
    medians = train(setting, mode, overrides(model, setting.on_gpu, mode), STEPS)
    steps = [row for row in metrics_of(setting.folder / mode) if row["step"] > 0]
    largest = max(row["on_policy/logprob_diff_max"] for row in steps)
    return {LARGEST: largest} | {name: medians[name] for name in TIMES if name in medians}


def overrides(model: str, on_gpu: bool, mode: str) -> list[str]:
    """Of the SGLang quickstart."""
    shape = [f"policy.model.{key}={str(value).lower()}" for key, value in MODELS[model].items()]
    return [*BOTH, *((*shape, *ON_GPU) if on_gpu else ()), *(EXACT if mode == "exact" else ())]


def judged(figures: Figures, on_gpu: bool) -> Figures:
    """With the ratios, and what is not met; times have no goal on a CPU."""
    step, decode = (ratio(figures, name) for name in (TIMES[0], TIMES[3]))
    if step is not None and decode is not None:
        figures = figures | {"step, exact / usual": step, "rollout tokens/s, exact / usual": decode}
    missed: list[str] = []
    largest = figures[f"exact: {LARGEST}"]
    if largest != 0:
        operation = figures.get("first operation that differs")
        missed.append(
            f"{LARGEST} is {largest:g}, at most 0" + (f"; first in {operation}" if operation else "")
        )
    if on_gpu and step is not None and decode is not None:
        missed += [f"a step takes {step:.2f} times as long, at most {MOST_STEP}"] if step > MOST_STEP else []
        if not decode >= LEAST_DECODE:
            missed.append(f"rollouts have {decode:.2f} of the usual tokens/s, at least {LEAST_DECODE}")
    return figures | ({"not met": missed} if missed else {})


def ratio(figures: Figures, name: str) -> float | None:
    """Exact / usual; None where the exact run ended before its first step."""
    if f"exact: {name}" not in figures:
        return None
    return float(figures[f"exact: {name}"] / figures[f"usual: {name}"])


def section(model: str) -> Section:
    run = functools.partial(exact_and_usual, model)
    return Section(f"exact mode: {model}", 150, run, alone=True, by_default=False)


EXACT_SECTIONS: Sequence[Section] = [section(model) for model in MODELS]
"""Together five minutes, so they run with `--only exact`."""
