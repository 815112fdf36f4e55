"""Rules about SGLang servers: repeatable samples, experts, and the library that broadcasts weights."""

from __future__ import annotations

from opo_megatron.config.architecture import FAMILIES
from opo_megatron.config.choices import Device, EngineName, GroupBackend, Transport
from opo_megatron.config.entries import SERVER_OPTIONS
from opo_megatron.config.rollout import SglangConfig
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config

DETERMINISTIC_BACKENDS = ("triton", "fa3", "fa4", "flashinfer")
"""Attention backends of SGLang's deterministic inference."""
ATTENTION_OPTIONS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
NO_DETERMINISTIC_CPU = (
    "rollout.sglang.deterministic=true {}, where SGLang has no deterministic attention; set it to false, or "
    "rollout.engine=local, whose samples are repeatable"
)


EXPERT_PARALLEL_OPTIONS = ("ep_size", "ep", "expert_parallel_size")
NO_EXPERT_PARALLEL_CPU = (
    SERVER_OPTIONS + ".{}={} {}, where SGLang cannot distribute experts; remove it, or set "
    "rollout.sglang.tensor_parallel_size, which splits every expert"
)


def check_sglang(config: Config) -> None:
    """Raise UserError at the first key of the servers that contradicts another."""
    if config.rollout.engine is not EngineName.sglang:
        return
    check_deterministic(config)
    check_experts(config)
    settings = config.rollout.sglang
    if settings.distributed_backend is None:
        return
    backend = f"rollout.sglang.distributed_backend={settings.distributed_backend.value}"
    require(
        settings.transport is Transport.distributed,
        f"{backend} with rollout.sglang.transport={settings.transport.value}, which broadcasts nothing; set "
        "rollout.sglang.transport=distributed, or remove rollout.sglang.distributed_backend",
    )
    require(
        settings.distributed_backend is GroupBackend.gloo or config.policy.device is not Device.cpu,
        f"{backend} with policy.device=cpu, whose memory NCCL does not read; set "
        "rollout.sglang.distributed_backend=gloo",
    )
    require(
        settings.distributed_backend is GroupBackend.nccl or not settings.fp8,
        f"{backend} with rollout.sglang.fp8=true, but gloo does not send FP8; set "
        "rollout.sglang.transport=tensor or disk, or rollout.sglang.distributed_backend=nccl",
    )


def check_experts(config: Config) -> None:
    """Check that SGLang has the model, returns the experts that are replayed, and can distribute them."""
    settings, model = config.rollout.sglang, config.policy.model
    require(
        model.num_moe_experts is None or any(family.expresses(model) for family in FAMILIES.values()),
        f"policy.model.num_moe_experts={model.num_moe_experts} with rollout.engine=sglang and "
        f"policy.model.qk_layernorm={_text(model.qk_layernorm)}, policy.model.add_qkv_bias="
        f"{_text(model.add_qkv_bias)}, but SGLang's model with experts is Qwen3-MoE's; set "
        "policy.model.qk_layernorm=true and policy.model.add_qkv_bias=false, or rollout.engine=local",
    )
    for name, value in settings.options.items():
        require(
            name.replace("-", "_") != "enable_return_routed_experts"
            or bool(value)
            or not config.rollout.routing_replay,
            f"{SERVER_OPTIONS}.enable_return_routed_experts is {_text(value)} and rollout.routing_replay is "
            "true; remove the first, or set rollout.routing_replay=false",
        )
    option = expert_parallel_option(settings)
    require(
        option is None or bool(settings.urls) or config.policy.device is not Device.cpu,
        NO_EXPERT_PARALLEL_CPU.format(*(option or ("", "")), "with policy.device=cpu"),
    )


def expert_parallel_option(settings: SglangConfig) -> tuple[str, object] | None:
    """The option by which the servers distribute experts over ranks, and its value."""
    for name, value in settings.options.items():
        if name.replace("-", "_") in EXPERT_PARALLEL_OPTIONS and value not in (None, False, 1):
            return name.replace("-", "_"), value
    return None


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower()


def check_deterministic(config: Config) -> None:
    """Check that SGLang's deterministic inference can work as the recipe sets it."""
    settings = config.rollout.sglang
    if not settings.deterministic:
        return
    require(
        bool(settings.urls) or config.policy.device is not Device.cpu,
        NO_DETERMINISTIC_CPU.format("with policy.device=cpu"),
    )
    for name, value in settings.options.items():
        option = name.replace("-", "_")
        require(
            option not in ATTENTION_OPTIONS or value is None or value in DETERMINISTIC_BACKENDS,
            f"{SERVER_OPTIONS}.{option}={value} with rollout.sglang.deterministic=true, which needs one of "
            f"{', '.join(DETERMINISTIC_BACKENDS)}; set one of these, or rollout.sglang.deterministic=false",
        )
        require(
            option != "enable_deterministic_inference" or bool(value),
            f"{SERVER_OPTIONS}.{option} is {str(value).lower()} and rollout.sglang.deterministic is true; "
            "remove the first",
        )
