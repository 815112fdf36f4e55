"""Experts on a GPU, as sections of check_gpu.py: the replay of SGLang's routing, and FP8 by blocks.

    python tools/check_gpu.py --only experts

The model of the runs has 64 experts, 8 of them per token, with all sides multiples of 128.
"""

from __future__ import annotations

import functools

from bench.gpu_layouts import layouts
from bench.gpu_runs import train
from bench.gpu_section import Figures, Section, Setting

EXPERTS = {
    "policy.model.qk_layernorm": "true",
    "policy.model.num_moe_experts": 64,
    "policy.model.moe_router_topk": 8,
    "policy.model.moe_ffn_hidden_size": 256,
}
ON_CPU = EXPERTS | {"policy.model.num_moe_experts": 8, "policy.model.moe_router_topk": 2}
LARGEST_SHARE = 0.4
"""Of the mismatch without replay, at most this with it."""
FP8_BOTH = ("policy.fp8=blockwise", "rollout.sglang.fp8=true")


def overrides_of(setting: Setting, *others: str) -> list[str]:
    shape = EXPERTS if setting.on_gpu else ON_CPU
    return [*(f"{key}={value}" for key, value in shape.items()), *others]


def replay(setting: Setting) -> Figures:
    """Mismatch with SGLang in bf16, with the engine's experts and with the policy's own."""
    own = train(setting, "own", overrides_of(setting, "rollout.routing_replay=false"))
    replayed = train(setting, "replayed", overrides_of(setting))
    name = "on_policy/logprob_diff_mean"
    share = replayed[name] / own[name]
    missed = f"mean |Δ log π| with replay is {share:.2f} of that without, at most {LARGEST_SHARE}"
    figures = {"share of the mismatch": share, "replayed": replayed, "own experts": own}
    return figures | ({"not met": [missed]} if share > LARGEST_SHARE else {})


def fp8(setting: Setting) -> Figures:
    """The policy's experts as grouped products in FP8, and an engine with the same bytes."""
    if not setting.on_gpu:
        return {"missing": "FP8 needs a GPU and Transformer Engine"}
    return {"FP8 on both sides": train(setting, "fp8", overrides_of(setting, *FP8_BOTH))}


EXPERT_SECTIONS = [
    Section("experts: SGLang's routing replayed, bf16", 240, replay, by_default=False),
    Section("experts: FP8 by blocks on both sides", 180, fp8, by_default=False),
    Section(
        "experts: layouts, bf16", 120, functools.partial(layouts, "experts, bf16", "bf16"), by_default=False
    ),
    Section(
        "experts: layouts, FP8", 120, functools.partial(layouts, "experts, FP8", "fp8"), by_default=False
    ),
]
