"""Rules about FP8, recomputation and optimizer offload.

FP8 of a policy is Transformer Engine's: weights and activations are quantized inside each linear layer,
parameters and the weight stream stay in bf16.  An engine samples from the same policy only if it quantizes
alike.  Only the FP8 recipe `blockwise` allows that: its weights have one scale per 128×128 block, a function
of that block alone.  So every matrix must consist of whole blocks on every rank, and the query, key and value
rows that Megatron keeps in one matrix must begin at block boundaries.  Any other engine generates off-policy
rollouts, which only importance weights make usable.
"""

from __future__ import annotations

from opo_megatron.algorithm.config import MismatchAction
from opo_megatron.config.choices import (
    FP8_BLOCK,
    FP8_MULTIPLE,
    Device,
    Dtype,
    EngineName,
    Fp8,
    Recompute,
    Scales,
)
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config, PolicyConfig


def check_gpu_options(config: Config) -> None:
    """Raise UserError at the first option that contradicts another or is not implemented."""
    check_recompute(config.policy)
    check_offload(config.policy)
    check_fp8(config)


def check_recompute(policy: PolicyConfig) -> None:
    """Check that only one key sets what is recomputed."""
    other = next((name for name in policy.megatron if name.startswith("recompute_")), None)
    require(
        other is None or policy.recompute is Recompute.none,
        f"policy.recompute is {policy.recompute.value} and policy.megatron.{other} is set too; remove one",
    )


def check_offload(policy: PolicyConfig) -> None:
    """Check what Megatron's optimizer in host memory needs in addition to GPUs."""
    if not policy.optimizer_offload:
        return
    offload = f"policy.optimizer_offload={policy.optimizer_offload:g}"
    require(
        policy.device is not Device.cpu,
        f"{offload} with policy.device=cpu, whose optimizer is in host memory anyway; set "
        "policy.optimizer_offload=0",
    )
    require(
        policy.dtype is Dtype.bf16 and policy.distributed_optimizer,
        f"{offload} with policy.dtype={policy.dtype.value} and policy.distributed_optimizer="
        f"{str(policy.distributed_optimizer).lower()}, but Megatron offloads only the sharded optimizer of a "
        "model in bf16; set policy.dtype=bf16 and policy.distributed_optimizer=true, or "
        "policy.optimizer_offload=0",
    )


def check_fp8(config: Config) -> None:
    """Check what FP8 needs in addition to a device that supports it."""
    policy, engine_has_fp8 = config.policy, bool(config.rollout.sglang.fp8)
    fp8 = "null" if policy.fp8 is None else policy.fp8.value
    require(
        not engine_has_fp8 or policy.fp8 is Fp8.blockwise,
        f"rollout.sglang.fp8 is true and policy.fp8 is {fp8}, so the engine would generate with other "
        "weights than the policy's; set policy.fp8=blockwise or rollout.sglang.fp8=false",
    )
    require(
        policy.fp8 is Fp8.blockwise or policy.fp8_scales is Scales.power_of_two,
        f"policy.fp8_scales={policy.fp8_scales.value} with policy.fp8={fp8}, but only blocks have "
        "such scales; set policy.fp8=blockwise, or remove policy.fp8_scales",
    )
    if policy.fp8 is None:
        return
    require(
        policy.device is not Device.cpu,
        f"policy.fp8={fp8} with policy.device=cpu, but Transformer Engine has no FP8 on a CPU; set "
        "policy.fp8=null",
    )
    require(
        policy.dtype is Dtype.bf16,
        f"policy.fp8={fp8} with policy.dtype={policy.dtype.value}, but everything else must be bf16; set "
        "policy.dtype=bf16",
    )
    require(
        policy.model.num_moe_experts is None or policy.fp8 is Fp8.blockwise,
        f"policy.fp8={fp8} with policy.model.num_moe_experts={policy.model.num_moe_experts}, but experts "
        "have FP8 by blocks only, which an engine can have too; set policy.fp8=blockwise, or null",
    )
    same_as_engine = config.rollout.engine is EngineName.sglang and engine_has_fp8
    if not same_as_engine:
        check_fp8_is_corrected(config, policy.fp8)
    check_fp8_shapes(policy, FP8_BLOCK if same_as_engine else FP8_MULTIPLE)


def check_fp8_is_corrected(config: Config, fp8: Fp8) -> None:
    """Check that rollouts of an engine with other weights than the FP8 policy's are corrected."""
    if config.rollout.engine is EngineName.local:
        engine, remedy = "rollout.engine=local", "rollout.engine=sglang with policy.fp8=blockwise"
    elif fp8 is Fp8.blockwise:
        engine, remedy = "rollout.sglang.fp8=false", "rollout.sglang.fp8=true"
    else:
        engine, remedy = "rollout.engine=sglang", "policy.fp8=blockwise"
    require(
        config.on_policy.action is MismatchAction.correct,
        f"policy.fp8={fp8.value} with {engine}, whose weights are bf16, samples from another policy than is "
        f"trained, and on_policy.action={config.on_policy.action.value} does not correct that; set "
        f"on_policy.action=correct, or {remedy}, or policy.fp8=null",
    )


def check_fp8_shapes(policy: PolicyConfig, multiple: int) -> None:
    """Check that every matrix shard has sides that are multiples of `multiple`."""
    model, tensor = policy.model, policy.tensor_model_parallel_size
    heads, head_dim = model.num_attention_heads, model.kv_channels or 0
    blocks = multiple == FP8_BLOCK
    reason = "the engine's 128×128 blocks to be the trainer's" if blocks else "FP8 products"
    ffn = (
        "policy.model.ffn_hidden_size / policy.tensor_model_parallel_size",
        model.ffn_hidden_size // tensor,
    )
    if model.num_moe_experts is not None:
        assert model.moe_ffn_hidden_size is not None and policy.expert_tensor_parallel_size is not None
        ffn = (
            "policy.model.moe_ffn_hidden_size / policy.expert_tensor_parallel_size",
            model.moe_ffn_hidden_size // policy.expert_tensor_parallel_size,
        )
    for name, size in (
        ("policy.model.hidden_size", model.hidden_size),
        ffn,
        ("policy.model.kv_channels", head_dim)
        if blocks
        else ("num_attention_heads × kv_channels / tensor_model_parallel_size", heads * head_dim // tensor),
    ):
        require(
            size % multiple == 0,
            f"{name} is {size}, which must be a multiple of {multiple} for {reason}; use fewer "
            "tensor-parallel ranks, or policy.fp8=null",
        )
