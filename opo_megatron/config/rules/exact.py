"""Rules of exact mode (`rollout.local.exact=true`).

Engine and policy agree bitwise only if both compute the same sums: in float32, by one thread, each on one
rank.  Whether the machine's BLAS does so is tested when a run starts.
"""

from __future__ import annotations

from opo_megatron.config.choices import Device, Dtype, EngineName, Packing
from opo_megatron.config.schema import Config
from opo_megatron.errors import UserError


def check_exact(config: Config) -> None:
    """Raise UserError at the first setting for which exactness is not proven."""
    if not config.rollout.local.exact:
        return
    policy = config.policy
    required = (
        (
            "rollout.engine",
            config.rollout.engine.value,
            EngineName.local.value,
            "which decodes in another process",
        ),
        ("policy.dtype", policy.dtype.value, Dtype.fp32.value, "whose rounding is too coarse"),
        (
            "policy.tensor_model_parallel_size",
            policy.tensor_model_parallel_size,
            1,
            "which splits sums over ranks",
        ),
        (
            "policy.expert_model_parallel_size",
            policy.expert_model_parallel_size,
            1,
            "which moves tokens between ranks",
        ),
        (
            "policy.packing",
            policy.packing.value,
            Packing.padded.value,
            "whose attention sums over another length than the engine's",
        ),
        ("policy.model.num_moe_experts", policy.model.num_moe_experts, None, "and experts are not exact"),
        ("run.threads_per_rank", config.run.threads_per_rank, 1, "which splits products between threads"),
    )
    if policy.device is Device.cuda:
        raise UserError(needs("policy.device", "cuda", "cpu", "where exactness is not proven"))
    for key, value, needed, reason in required:
        if value != needed:
            raise UserError(needs(key, value, "null" if needed is None else needed, reason))


def needs(key: str, value: object, needed: object, reason: str) -> str:
    """The error message for a setting that exact mode does not support."""
    return (
        f"rollout.local.exact=true needs {key}={needed}, but it is {value}, {reason}; set {key}={needed} or "
        "rollout.local.exact=false"
    )
