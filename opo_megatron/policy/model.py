"""The recipe's decoder-only Megatron-Core `GPTModel`: RMSNorm, SwiGLU, RoPE, GQA, optionally MoE.

Layers are Transformer Engine's on GPUs where it is installed, else Megatron's local ones (see
`layer_specs.py`).  Two things differ from Megatron's local layer spec (and more in exact mode, see
`exact_layers.py`).  The norm is the project's, because Megatron's torch norm does not support sequence
parallelism.  The output layer keeps its weight, name and checkpoint entry but returns hidden states:
logits exist only inside `kernels/lm_head.py`, chunk by chunk.  Dropout is 0, because the engine samples
without it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from opo_megatron.config.choices import Dtype, Fp8
from opo_megatron.config.schema import ModelConfig, PolicyConfig
from opo_megatron.errors import UserError
from opo_megatron.kernels.rotary import inverse_frequencies
from opo_megatron.policy.layer_specs import (
    device_fields,
    fp8_fields,
    fuse_weight_gradients,
    fuses_weight_gradients,
    layer_spec,
    recompute_fields,
    refuse_fused_gradients,
    set_fp8_scales,
    spec_name,
)

BUCKET_MULTIPLE = 128
"""The distributed optimizer pads gradient buckets to multiples of this and of the number of ranks."""


def padded_vocab_size(policy: PolicyConfig, vocab_size: int, dp_size: int) -> int:
    """The vocabulary size, padded so that every tensor-parallel rank holds the same number of rows.

    A tied embedding shared by two pipeline stages has a gradient bucket of its own, which Megatron's
    distributed optimizer pads.  Its checkpoints read the wrong elements where there is padding between
    buckets, so the vocabulary is padded until the bucket needs none.  Optimizer state is sharded over
    data- and context-parallel ranks.
    """
    rows = policy.tensor_model_parallel_size
    shared = policy.model.tie_embeddings and policy.pipeline_model_parallel_size > 1
    if shared and policy.distributed_optimizer:
        alignment = math.lcm(BUCKET_MULTIPLE, dp_size * policy.context_parallel_size)
        rows *= alignment // math.gcd(alignment, policy.model.hidden_size)
    return -(-vocab_size // rows) * rows


def transformer_config(
    policy: PolicyConfig, device: torch.device, is_exact: bool = False
) -> TransformerConfig:
    """The recipe's model and parallel layout as Megatron's TransformerConfig."""
    model = policy.model
    dtype = torch.bfloat16 if policy.dtype is Dtype.bf16 else torch.float32
    virtual = policy.virtual_pipeline_model_parallel_size
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "qk_layernorm": model.qk_layernorm,
        "add_qkv_bias": model.add_qkv_bias,
        "layernorm_epsilon": model.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": policy.tensor_model_parallel_size,
        "pipeline_model_parallel_size": policy.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual,
        "sequence_parallel": policy.sequence_parallel,
        "context_parallel_size": policy.context_parallel_size,
        "expert_model_parallel_size": policy.expert_model_parallel_size,
        "expert_tensor_parallel_size": policy.expert_tensor_parallel_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": policy.dtype is Dtype.bf16,
        "use_cpu_initialization": device.type != "cuda",
        "perform_initialization": False,  # weights come from `weights/`, the same under every parallel layout
        "calculate_per_token_loss": True,  # the head's gradient is final; Megatron must not rescale it
        # Interleaved schedules cannot exchange shapes: Megatron does so by batched p2p, see below.
        "variable_seq_lengths": virtual is None,
        "moe_token_dispatcher_type": "alltoall",
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "apply_rope_fusion": False,
    }
    fields |= device_fields(policy, device, is_exact) | fp8_fields(policy) | recompute_fields(policy)
    if virtual is not None:
        # Interleaved, batched p2p over 2 stages is silently wrong: both neighbours are one peer.
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if model.num_moe_experts is not None:
        fields |= _expert_fields(model)
    if is_exact:
        refuse_fused_gradients(policy)
    # Transformer Engine's layers get it when they are built, see `fuse_weight_gradients`.
    is_local = spec_name(device, is_exact) == "local" and not is_exact
    fused = is_local and fuses_weight_gradients(policy, device)
    fields |= policy.megatron | {"gradient_accumulation_fusion": fused}
    if not policy.megatron:
        return TransformerConfig(**fields)
    try:
        return TransformerConfig(**fields)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"Megatron-Core rejects policy.megatron={policy.megatron} ({error}); fix or remove it"
        ) from error


def _expert_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_load_balancing_type": "none",  # the objective has no auxiliary loss
        "moe_aux_loss_coeff": 0.0,
        "moe_enable_routing_replay": True,  # where the rollouts carry experts, see `routing_replay.py`
    }


def build_chunks(
    policy: PolicyConfig,
    vocab_size: int,
    pp_rank: int,
    dp_size: int,
    device: torch.device,
    model: type[GPTModel] = GPTModel,
    exact: bool = False,
) -> list[GPTModel]:
    """This rank's model chunks (one, or one per virtual stage), with uninitialized weights."""
    config, name = transformer_config(policy, device, exact), spec_name(device, exact)
    if policy.fp8 is Fp8.blockwise and name == "transformer_engine":
        set_fp8_scales(policy.fp8_scales)
    stages = policy.virtual_pipeline_model_parallel_size or 1
    last = policy.pipeline_model_parallel_size - 1
    spec, norm = layer_spec(config, name, policy.exact_sum_parts if exact else None)
    layers = config.num_layers // (policy.pipeline_model_parallel_size * stages)
    chunks = []
    for stage in range(stages):
        chunk = model(
            config,
            TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm),
            vocab_size=padded_vocab_size(policy, vocab_size, dp_size),
            max_sequence_length=policy.model.max_sequence_length,
            pre_process=pp_rank == 0 and stage == 0,
            post_process=pp_rank == last and stage == stages - 1,
            position_embedding_type="rope",
            rotary_base=policy.model.rotary_base,
            share_embeddings_and_output_weights=policy.model.tie_embeddings,
            vp_stage=stage if stages > 1 else None,
        )
        # Megatron hard-codes the RoPE scaling constants; policy and engine must use the same frequencies.
        chunk.rotary_pos_emb.inv_freq = inverse_frequencies(policy.model).to(chunk.rotary_pos_emb.inv_freq)
        if chunk.post_process:
            chunk.output_layer.forward = _pass_through
        if name == "transformer_engine" and fuses_weight_gradients(policy, device):
            fuse_weight_gradients(chunk)
        chunks.append(chunk)
    RouterReplay.clear_global_router_replay_instances()  # it would keep every model's routers, unused
    return chunks


def head_weight(chunk: GPTModel) -> Tensor:
    """The output matrix [local vocabulary, hidden] of a last-stage chunk, tied or not."""
    return chunk.shared_embedding_or_output_weight() if _is_tied(chunk) else chunk.output_layer.weight


def head_shares_embedding(chunk: GPTModel) -> bool:
    """Whether one parameter of this chunk is both embedding and output."""
    return _is_tied(chunk) and chunk.pre_process


def _is_tied(chunk: GPTModel) -> bool:
    return bool(chunk.share_embeddings_and_output_weights)


def _pass_through(
    hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
) -> tuple[Tensor, None]:
    return hidden, None
