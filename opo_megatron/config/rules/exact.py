"""Rules of exact mode (`rollout.local.exact=true`, `rollout.sglang.exact=true`).

Engine and policy agree bitwise only if both compute the same sums: on a CPU by one thread, on a GPU by the
same Triton kernels in bf16.  Whether they do so on this machine is tested when a run starts.
"""

from __future__ import annotations

import math

from opo_megatron.config.choices import Device, Dtype, EngineName
from opo_megatron.config.entries import SERVER_OPTIONS
from opo_megatron.config.rules.require import divides, require
from opo_megatron.config.schema import Config

TRAINER, SERVER = "policy.tensor_model_parallel_size", "rollout.sglang.tensor_parallel_size"
PROVEN_OPTIONS = frozenset(
    (
        # How requests are put together
        *("chunked-prefill-size", "max-prefill-tokens", "max-total-tokens", "max-running-requests"),
        *("max-queued-requests", "enable-mixed-chunk", "disable-overlap-schedule", "disable-radix-cache"),
        *("schedule-policy", "schedule-conservativeness", "radix-eviction-policy", "mem-fraction-static"),
        *("sleep-on-idle", "stream-interval", "skip-server-warmup", "random-seed", "grammar-backend"),
        # Which batches decode in a CUDA graph
        *("cuda-graph-max-bs-decode", "cuda-graph-bs-decode", "disable-cuda-graph-padding"),
        *("disable-cuda-graph", "disable-decode-cuda-graph"),
        # What is logged
        *("log-level", "log-level-http", "log-requests", "log-requests-level", "decode-log-interval"),
        *("enable-metrics", "enable-request-time-stats-logging", "show-time-cost", "watchdog-timeout"),
    )
)
"""Options of SGLang that change no operation."""


def exact_switch(config: Config) -> str | None:
    """The key that makes this run exact; None where it is not."""
    rollout = config.rollout
    if rollout.local.exact:
        return "rollout.local.exact"
    return "rollout.sglang.exact" if rollout.sglang.exact else None


def check_exact(config: Config) -> None:
    """Raise UserError at the first setting for which exactness is not proven."""
    switch, parts = exact_switch(config), config.policy.exact_sum_parts
    if switch is None:
        require(
            parts == 1,
            f"policy.exact_sum_parts is {parts}, but only exact mode adds sums in parts; set it to 1, or "
            "rollout.local.exact=true or rollout.sglang.exact=true",
        )
        return
    engine = EngineName.local if switch == "rollout.local.exact" else EngineName.sglang
    policy, sglang = config.policy, config.rollout.sglang
    required: list[tuple[str, object, object, str]] = [
        ("rollout.engine", config.rollout.engine.value, engine.value, "whose operations are others"),
        (
            "policy.expert_model_parallel_size",
            policy.expert_model_parallel_size,
            1,
            "which moves tokens between ranks",
        ),
        (
            "policy.model.num_moe_experts",
            policy.model.num_moe_experts,
            None,
            "and products of few rows each, padded to tiles of fixed size, cost more than a dense layer",
        ),
        ("policy.fp8", policy.fp8 and policy.fp8.value, None, "whose products exact mode does not have"),
    ]
    if policy.device is not Device.cuda:
        required.append(
            ("run.threads_per_rank", config.run.threads_per_rank, 1, "which splits products between threads")
        )
    if engine is EngineName.sglang:
        required += [
            ("rollout.sglang.fp8", bool(sglang.fp8), False, "and the policy's weights are not FP8"),
            (
                "rollout.sglang.deterministic",
                sglang.deterministic,
                False,
                "whose operations are SGLang's own",
            ),
        ]
    if policy.device is Device.cuda:
        required += on_gpus(policy.dtype)
    for key, value, needed, reason in required:
        require(value == needed, needs(switch, key, value, needed, reason))
    check_parts(switch, config)
    if engine is EngineName.sglang:
        for name, value in sglang.options.items():
            require(
                value is not None,
                f"{SERVER_OPTIONS}.{name} is null, which may leave out what rollout.sglang.exact=true sets; "
                "give it a value or remove it",
            )
            is_proven = name.replace("_", "-") in PROVEN_OPTIONS
            require(
                is_proven,
                f"rollout.sglang.exact=true chooses the server's operations, and {SERVER_OPTIONS}.{name}="
                f"{_text(value)} is not proven to leave them alone; remove it or set "
                "rollout.sglang.exact=false",
            )


def on_gpus(dtype: Dtype) -> list[tuple[str, object, object, str]]:
    """What exact mode needs on a GPU: (key, value, needed, reason)."""
    return [("policy.dtype", dtype.value, "bf16", "whose kernels on GPUs are not proven")]


def check_parts(switch: str, config: Config) -> None:
    """Check that parts of sums can be split over tensor-parallel ranks, and sums into parts."""
    policy, model = config.policy, config.policy.model
    parts, ranks = policy.exact_sum_parts, {TRAINER: policy.tensor_model_parallel_size}
    if config.rollout.engine is EngineName.sglang:
        ranks[SERVER] = config.rollout.sglang.tensor_parallel_size
    for key, size in ranks.items():
        require(
            parts % size == 0,
            f"{switch}=true with {key}={size} needs policy.exact_sum_parts to be a multiple of it, but it is "
            f"{parts}; set policy.exact_sum_parts={math.lcm(*ranks.values())}",
        )
    divides("policy.exact_sum_parts", parts, "policy.model.ffn_hidden_size", model.ffn_hidden_size)
    width = model.num_attention_heads * (model.kv_channels or 0)
    divides("policy.exact_sum_parts", parts, "the width of all attention heads", width)
    if SERVER in ranks:
        divides(SERVER, ranks[SERVER], "policy.model.num_query_groups", model.num_query_groups or 1)


def needs(switch: str, key: str, value: object, needed: object, reason: str) -> str:
    """The error message for a setting that exact mode does not support."""
    setting = f"{key}={_text(needed)}"
    return (
        f"{switch}=true needs {setting}, but it is {_text(value)}, {reason}; set {setting} or {switch}=false"
    )


def _text(value: object) -> str:
    """A value as recipes write it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
