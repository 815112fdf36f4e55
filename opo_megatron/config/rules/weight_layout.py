"""Rules about what is sent to SGLang servers: full tensors, or each rank's own slices.

What a rank holds follows from the recipe only while nothing else changes it, so options of the server that
are not known to leave its tensors alone mean full tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from opo_megatron.config.choices import FP8_BLOCK, Device, EngineName, Transport, WeightLayout
from opo_megatron.config.entries import SERVER_OPTIONS
from opo_megatron.config.rules.exact import PROVEN_OPTIONS
from opo_megatron.config.rules.require import require
from opo_megatron.config.rules.sglang import EXPERT_PARALLEL_OPTIONS, expert_parallel_option
from opo_megatron.config.schema import Config, ModelConfig

KEEPS_TENSORS = PROVEN_OPTIONS | {
    *("attention-backend", "prefill-attention-backend", "decode-attention-backend", "sampling-backend"),
    *("grammar-backend", "page-size", "kv-cache-dtype", "enable-deterministic-inference", "device"),
    *("disable-cuda-graph", "cuda-graph-max-bs", "cuda-graph-bs", "disable-cuda-graph-padding"),
    *("enable-memory-saver", "disable-custom-all-reduce", "enable-nccl-nvls", "disable-piecewise-cuda-graph"),
    *("enable-return-routed-experts", "context-length", "base-gpu-id", "nccl-port", "host", "port"),
    *(name.replace("_", "-") for name in EXPERT_PARALLEL_OPTIONS),
}
"""Options of SGLang with which its ranks hold the same tensors."""
CPU_MULTIPLE = 32
"""On a CPU SGLang pads widths to a multiple of this on every rank."""


def check_weight_layout(config: Config) -> None:
    """Raise UserError where slices are asked for, but the recipe does not allow them."""
    rollout = config.rollout
    if rollout.engine is EngineName.sglang and rollout.sglang.layout is WeightLayout.slices:
        require_slices(why_full(config, on_cpu=config.policy.device is Device.cpu))


def require_slices(reason: str | None) -> None:
    """Raise UserError with the reason why there are none."""
    require(
        reason is None,
        f"rollout.sglang.layout=slices, but {reason}; change that, or set rollout.sglang.layout=auto, which "
        "sends full tensors then",
    )


def why_full(config: Config, on_cpu: bool) -> str | None:
    """Why the servers get full tensors; None where slices are possible as far as the recipe says."""
    settings = config.rollout.sglang
    if settings.layout is WeightLayout.full:
        return "rollout.sglang.layout=full"
    if settings.transport is not Transport.tensor:
        return f"rollout.sglang.transport={settings.transport.value} sends full tensors alone"
    if settings.exact:
        return "the model of rollout.sglang.exact=true has tensors of its own"
    if settings.urls and settings.layout is WeightLayout.auto:
        return "the servers of rollout.sglang.urls may hold other tensors than this recipe's would"
    for name, value in settings.options.items():
        if value not in (None, False) and name.replace("_", "-") not in KEEPS_TENSORS:
            return f"{SERVER_OPTIONS}.{name.replace('-', '_')} may change which tensors a server holds"
    return next(_sizes(config, on_cpu), None)


def _sizes(config: Config, on_cpu: bool) -> Iterator[str]:
    """What cannot be cut as the engine cuts it."""
    policy_tp = config.policy.tensor_model_parallel_size
    engine_tp = config.rollout.sglang.tensor_parallel_size
    if policy_tp % engine_tp and engine_tp % policy_tp:
        yield (
            f"of policy.tensor_model_parallel_size={policy_tp} and rollout.sglang.tensor_parallel_size="
            f"{engine_tp} neither is a multiple of the other"
        )
    model, experts, option = config.policy.model, 1, expert_parallel_option(config.rollout.sglang)
    if option is not None:
        name, value = option
        experts = value if isinstance(value, int) and value > 0 else 0
        if not experts or engine_tp % experts or (model.num_moe_experts or 1) % experts:
            yield f"{SERVER_OPTIONS}.{name}={value} does not divide the ranks and the experts of a server"
            return
    groups = model.num_query_groups or 1
    if groups % engine_tp and (engine_tp % groups or on_cpu):
        yield f"policy.model.num_query_groups={groups} cannot be cut by {engine_tp} ranks of a server"
    for what, size, ranks, unit in _widths(model, engine_tp, engine_tp // experts, on_cpu):
        if config.rollout.sglang.fp8 and size % FP8_BLOCK == model.hidden_size % FP8_BLOCK == 0:
            unit = math.lcm(unit, FP8_BLOCK)
        if size % (ranks * unit):
            yield f"{what}={size} cannot be cut by {ranks} ranks of a server into multiples of {unit}"


def expert_ranks(config: Config) -> int:
    """Expert-parallel ranks of a server."""
    option = expert_parallel_option(config.rollout.sglang)
    return 1 if option is None else int(str(option[1]))


def _widths(model: ModelConfig, ranks: int, expert: int, on_cpu: bool) -> Iterator[tuple[str, int, int, int]]:
    """(name, size, ranks that share it, what it must be cut into multiples of)."""
    heads, head, groups = model.num_attention_heads, model.kv_channels or 1, model.num_query_groups or 1
    unit = CPU_MULTIPLE if on_cpu else 1
    yield "the width of all attention heads", heads * head, ranks, head
    yield "the width of all keys", groups * head, min(ranks, groups), head
    if model.num_moe_experts is None:
        yield "policy.model.ffn_hidden_size", model.ffn_hidden_size, ranks, unit
    else:
        yield "policy.model.moe_ffn_hidden_size", model.moe_ffn_hidden_size or 0, expert, unit
