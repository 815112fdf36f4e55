"""Layer specs (Megatron's local modules, or Transformer Engine's), and FP8 as TransformerConfig fields.

Transformer Engine (TE) fuses each norm into the linear layer that follows, never materializes attention
scores, and is required for FP8.  It needs a GPU.  It is used where the device is a GPU and it can be
imported; everything else follows from `spec_name`.

The recipes of `policy.fp8`, by scaling granularity (TE's `common/recipe`):

    blockwise    weights 128×128, activations and gradients 1×128, all E4M3, current scaling, by powers of
                 two or not (`policy.fp8_scales`): `kernels/fp8.py` gives the same bytes
    tensorwise   per-tensor current scaling, from this step's amax; gradients in E5M2
    delayed      per-tensor delayed scaling, from the amax of the last 1,024 steps; gradients in E5M2
    mxfp8        1×32, for Blackwell

Parameters stay in bf16 (`fp8_param` is off), so FP8 does not affect the optimizer, checkpoints or the weight
stream.  Embedding and head stay in bf16 as well.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from opo_megatron.config.choices import FP8_BLOCK, FP8_MULTIPLE, Dtype, Fp8, Packing, Recompute, Scales
from opo_megatron.config.schema import PolicyConfig
from opo_megatron.environment.versions import numbers, read_versions
from opo_megatron.errors import UserError
from opo_megatron.kernels import exact
from opo_megatron.policy.exact_layers import use_exact_layers
from opo_megatron.policy.packed_attention import PackedAttention
from opo_megatron.weights.param_mapping import LayerSpec

_MIN_CAPABILITY = {
    Fp8.blockwise: ((9, 0), "Hopper"),
    Fp8.tensorwise: ((8, 9), "Ada or Hopper"),
    Fp8.delayed: ((8, 9), "Ada or Hopper"),
    Fp8.mxfp8: ((10, 0), "Blackwell"),
}
"""Minimum compute capability of each recipe, as TE checks it, and the generation's name."""
TE_SCALES_VARIABLE = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""With the value 1, TE's blocks have fp32 scales unless the program says otherwise."""

_APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked for sequence parallelism, so that its gradient is summed over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ExactRMSNorm(RMSNorm):
    """The norm of `kernels/exact.py`."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return exact.rms_norm(x, self.weight, self.eps)


def spec_name(device: torch.device, is_exact: bool = False) -> LayerSpec:
    """Which of Megatron's layer specs a policy on this device uses.

    Exact mode has Megatron's local spec with layers of its own on GPUs as well.
    """
    has_engine = device.type == "cuda" and find_spec("transformer_engine") is not None and not is_exact
    return "transformer_engine" if has_engine else "local"


def layer_spec(config: TransformerConfig, name: LayerSpec, exact_parts: int | None) -> tuple[Any, type]:
    """The spec of one layer, and the class of the final norm.

    Args:
        exact_parts: `policy.exact_sum_parts` in exact mode, otherwise None.
    """
    if name == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.num_moe_experts is not None,  # the names in weights/param_mapping.py
            qk_layernorm=config.qk_layernorm,
        )
        return spec, TENorm
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    norm = RMSNorm if exact_parts is None else ExactRMSNorm
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if attention.q_layernorm is not IdentityOp:
        attention.q_layernorm = attention.k_layernorm = norm
    if exact_parts is not None:
        use_exact_layers(spec, exact_parts)
    return spec, norm


def refuse_fused_gradients(policy: PolicyConfig) -> None:
    """Raise UserError where a policy in exact mode is asked for what its layers cannot do."""
    if policy.megatron.get("gradient_accumulation_fusion"):
        raise UserError(
            "policy.megatron.gradient_accumulation_fusion is true, but the layers of exact mode compute "
            "their own gradients; remove it"
        )


def fuses_weight_gradients(policy: PolicyConfig, device: torch.device) -> bool:
    """Whether layers add their weight gradients to the fp32 `main_grad` within the matrix product.

    TE's layers do so by themselves, Megatron's by an extension of Apex.

    Raises:
        UserError: where policy.megatron.gradient_accumulation_fusion asks for it in vain.
    """
    asked = policy.megatron.get("gradient_accumulation_fusion")
    if device.type == "meta":  # no kernel runs
        return False
    has_apex = device.type == "cuda" and find_spec(_APEX_EXTENSION) is not None
    possible = has_apex or spec_name(device) == "transformer_engine"
    if asked and not possible:
        lacks = (
            "this policy is on a CPU; remove it"
            if device.type == "cpu"
            else f"neither Transformer Engine nor Apex's {_APEX_EXTENSION} is installed; remove it, or "
            f"install Transformer Engine with: {read_versions().part('transformer-engine').fix}"
        )
        raise UserError(f"policy.megatron.gradient_accumulation_fusion is true, but {lacks}")
    return possible if asked is None else bool(asked)


def fuse_weight_gradients(chunk: torch.nn.Module) -> None:
    """Let the TE layers of `chunk` add their weight gradients to `main_grad` themselves.

    TransformerConfig's `gradient_accumulation_fusion` would, too, but with it Megatron's own output layer
    refuses to be built without Apex, although its gradient is computed in `kernels/lm_head.py`.
    """
    layers = [module for module in chunk.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    if not layers:
        raise RuntimeError("no layer of Transformer Engine has the attribute fuse_wgrad_accumulation")
    for layer in layers:
        layer.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def device_fields(policy: PolicyConfig, device: torch.device, is_exact: bool = False) -> dict[str, Any]:
    """Fields of TransformerConfig that depend on the device and on the packages installed."""
    fields: dict[str, Any] = {}
    if policy.model.num_moe_experts is not None and spec_name(device, is_exact) == "transformer_engine":
        fields["moe_grouped_gemm"] = True
    if policy.packing is Packing.thd and spec_name(device, is_exact) == "transformer_engine":
        # Megatron's unfused RoPE for packed sequences copies cu_seqlens to the host in every layer.
        fields["apply_rope_fusion"] = True
    return fields


def fp8_fields(policy: PolicyConfig) -> dict[str, Any]:
    """`policy.fp8` as fields of TransformerConfig."""
    if policy.fp8 is None:
        return {}
    per_tensor = policy.fp8 in (Fp8.tensorwise, Fp8.delayed)
    fields: dict[str, Any] = {"fp8": "hybrid" if per_tensor else "e4m3", "fp8_recipe": policy.fp8.value}
    if policy.fp8 is Fp8.delayed:
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields


def set_fp8_scales(scales: Scales) -> None:
    """Make Transformer Engine quantize blocks with such scales, whose class Megatron passes no option.

    Raises:
        UserError: where Transformer Engine's own variable asks for others.
    """
    from transformer_engine.common.recipe import Float8BlockScaling, QParams

    is_power = scales is Scales.power_of_two
    if (value := os.environ.get(TE_SCALES_VARIABLE)) is not None and (value == "1") is is_power:
        raise UserError(
            f"{TE_SCALES_VARIABLE}={value} contradicts policy.fp8_scales={scales.value}; unset the variable, "
            f"or set policy.fp8_scales={(Scales.fp32 if is_power else Scales.power_of_two).value}"
        )
    for name in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(Float8BlockScaling, name, QParams(power_2_scale=is_power, amax_epsilon=0.0))


def recompute_fields(policy: PolicyConfig) -> dict[str, Any]:
    """`policy.recompute` as fields of TransformerConfig."""
    if policy.recompute is Recompute.full:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if policy.recompute is Recompute.selective:
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def row_multiple(policy: PolicyConfig) -> int:
    """Ranks that a micro-batch's rows are split over: the padded length must be a multiple of this."""
    return policy.context_parallel_size * (
        policy.tensor_model_parallel_size if policy.sequence_parallel else 1
    )


def token_multiple(policy: PolicyConfig) -> int:
    """Alignment of a micro-batch's number of tokens (rows × padded length).

    TE all-gathers a blockwise activation over sequence-parallel ranks only where each holds whole blocks.
    """
    if policy.fp8 is None:
        return 1
    per_rank = FP8_MULTIPLE if policy.fp8 in (Fp8.tensorwise, Fp8.delayed) else FP8_BLOCK
    return per_rank * row_multiple(policy)


def check_fp8_device(policy: PolicyConfig, device: torch.device) -> None:
    """Check that this machine supports `policy.fp8`.

    Raises:
        UserError: naming what is missing.
    """
    if policy.fp8 is None:
        return
    if device.type != "cuda":
        reason: str | None = "a GPU, and this run is on a CPU; set policy.fp8=null, or run it on GPUs"
    else:
        from importlib.metadata import PackageNotFoundError, version

        try:
            engine = version("transformer-engine")
        except PackageNotFoundError:
            engine = None
        reason = fp8_lacks(policy.fp8, torch.cuda.get_device_capability(device), engine, torch.version.cuda)
    if reason is not None:
        raise UserError(f"policy.fp8={policy.fp8.value} needs {reason}")


def check_context_device(policy: PolicyConfig, device: torch.device) -> None:
    """Check that Transformer Engine has an attention kernel for `policy.context_parallel_size`.

    Raises:
        UserError: naming what is missing.
    """
    is_split = policy.context_parallel_size > 1 and spec_name(device) == "transformer_engine"
    if is_split and policy.dtype is not Dtype.bf16:
        raise UserError(
            f"policy.context_parallel_size={policy.context_parallel_size} with policy.dtype="
            f"{policy.dtype.value}, but Transformer Engine's attention over several GPUs has no fp32; set "
            "policy.dtype=bf16, or policy.context_parallel_size=1"
        )


def fp8_lacks(fp8: Fp8, capability: tuple[int, int], engine: str | None, cuda: str | None) -> str | None:
    """What a GPU with these versions lacks for an FP8 recipe, with the fix; None where nothing is missing.

    Args:
        capability: compute capability of the device.
        engine: version of Transformer Engine; None where it is not installed.
        cuda: CUDA version that torch was built for.
    """
    versions = read_versions()
    minimum, generation = _MIN_CAPABILITY[fp8]
    if capability < minimum:
        other = "policy.fp8=blockwise" if capability >= (9, 0) else "policy.fp8=null"
        return (
            f"compute capability {minimum[0]}.{minimum[1]} ({generation}), and this GPU has "
            f"{capability[0]}.{capability[1]}; set {other}"
        )
    part = versions.part("transformer-engine")
    if engine is None:
        return f"Transformer Engine, which is not installed; install it with: {part.fix}"
    if not part.accepts(engine):
        return (
            f"Transformer Engine {part.wanted}, and {engine} is installed; install another with: {part.fix}"
        )
    cuda_minimum = versions.cuda["blockwise_fp8_at_least"]
    if fp8 is Fp8.blockwise and numbers(cuda or "0") < numbers(cuda_minimum):
        return f"CUDA {cuda_minimum} or newer, and torch is built for {cuda}; install another build of torch"
    return None
