"""Rules about SGLang servers: repeatable samples, and the library that broadcasts weights."""

from __future__ import annotations

from opo_megatron.config.choices import Device, EngineName, GroupBackend, Transport
from opo_megatron.config.entries import SERVER_OPTIONS
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config

DETERMINISTIC_BACKENDS = ("triton", "fa3", "fa4", "flashinfer")
"""Attention backends of SGLang's deterministic inference."""
ATTENTION_OPTIONS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
NO_DETERMINISTIC_CPU = (
    "rollout.sglang.deterministic=true {}, where SGLang has no deterministic attention; set it to false, or "
    "rollout.engine=local, whose samples are repeatable"
)


def check_sglang(config: Config) -> None:
    """Raise UserError at the first key of the servers that contradicts another."""
    if config.rollout.engine is not EngineName.sglang:
        return
    check_deterministic(config)
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
