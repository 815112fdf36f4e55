"""What exact mode (`rollout.local.exact=true`) asks of a recipe.

Engine and policy agree bit for bit only where both do the same sums: in float32, by one thread, and
with every sum on one rank.  Whether the machine keeps that promise is tested when a run starts.
"""

from __future__ import annotations

from opo_megatron.config.choices import Device, Dtype, EngineName, Packing
from opo_megatron.config.schema import Config
from opo_megatron.errors import UserError


def check_exact(config: Config) -> None:
    """Raise UserError at the first setting under which exactness is not proven."""
    if not config.rollout.local.exact:
        return
    policy = config.policy
    wanted = (
        ("rollout.engine", config.rollout.engine.value, EngineName.local.value, "which decodes elsewhere"),
        ("policy.dtype", policy.dtype.value, Dtype.fp32.value, "which rounds more than it can hide"),
        (
            "policy.tensor_model_parallel_size",
            policy.tensor_model_parallel_size,
            1,
            "which cuts sums over ranks",
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
            "whose attention sums every sequence over another length than the engine's",
        ),
        ("policy.model.num_moe_experts", policy.model.num_moe_experts, None, "and experts are not exact"),
        ("run.threads_per_rank", config.run.threads_per_rank, 1, "which cuts products between threads"),
    )
    if policy.device is Device.cuda:
        raise UserError(needs("policy.device", "cuda", "cpu", "where exactness is not proven"))
    for key, value, needed, why in wanted:
        if value != needed:
            raise UserError(needs(key, value, "null" if needed is None else needed, why))


def needs(key: str, value: object, needed: object, why: str) -> str:
    """The sentence of a refusal."""
    return (
        f"rollout.local.exact=true needs {key}={needed}, but it is {value}, {why}; set {key}={needed} or "
        "rollout.local.exact=false"
    )
