"""Small models of the families that the project trains, and their counterparts in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from conftest import require
from safetensors.torch import save_file
from torch import Tensor

from opo_megatron.config.schema import ModelConfig, RopeScalingConfig, RopeType

VOCAB_SIZE = 21

LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=8,
    rotary_base=100.0,
    max_sequence_length=64,
)
QWEN3 = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=16,
    qk_layernorm=True,
    tie_embeddings=True,
    rotary_base=1000.0,
    max_sequence_length=64,
)
QWEN3_MOE = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=40,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    qk_layernorm=True,
    max_sequence_length=64,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=24,
)
LLAMA3 = ModelConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=40,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=12,
    tie_embeddings=True,
    rotary_base=500.0,
    rope_scaling=RopeScalingConfig(RopeType.llama3, 8.0, 1.5, 6.0, original_max_sequence_length=16),
    max_sequence_length=64,
)
MISTRAL = ModelConfig(
    num_layers=2,
    hidden_size=20,
    ffn_hidden_size=36,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=10,
    rope_scaling=RopeScalingConfig(RopeType.linear, 2.5),
    max_sequence_length=64,
)
QWEN2 = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=44,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=4,
    add_qkv_bias=True,
    rotary_base=1000.0,
    layernorm_epsilon=1e-5,
    max_sequence_length=64,
)
FAMILIES = {
    "llama": LLAMA,
    "llama, scaled, tied": LLAMA3,
    "mistral, scaled": MISTRAL,
    "qwen2": QWEN2,
    "qwen2, tied": replace(QWEN2, tie_embeddings=True),
    "qwen3, tied": QWEN3,
    "qwen3": replace(QWEN3, tie_embeddings=False),
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, not normalised": replace(QWEN3_MOE, moe_router_pre_softmax=True, moe_router_topk=3),
}


def transformers_config(family: str) -> Any:
    """The family's configuration as a user of transformers would write it."""
    transformers, model = require("transformers", "make setup-dev"), FAMILIES[family]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    scaling = model.rope_scaling
    if scaling.type is not RopeType.none:
        rope |= {"rope_type": scaling.type.value, "factor": scaling.factor}
    if scaling.type is RopeType.llama3:
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        rope["original_max_position_embeddings"] = scaling.original_max_sequence_length
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "rms_norm_eps": model.layernorm_epsilon,
        "max_position_embeddings": model.max_sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": rope,
    }
    name = family.partition(",")[0]
    if name == "mistral":
        return transformers.MistralConfig(**shape, sliding_window=None)
    if name == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            **shape,
            num_experts=model.num_moe_experts,
            num_experts_per_tok=model.moe_router_topk,
            moe_intermediate_size=model.moe_ffn_hidden_size,
            norm_topk_prob=not model.moe_router_pre_softmax,
        )
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    return classes[name](**shape)


def transformers_model(family: str) -> Any:
    """The same architecture built by transformers, in float32 and evaluation mode."""
    config = transformers_config(family)
    transformers = require("transformers", "make setup-dev")
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def transformers_model_with(family: str, weights: dict[str, Tensor], folder: Path) -> Any:
    """The same, with `weights` read from a checkpoint folder by transformers' own loader."""
    transformers = require("transformers", "make setup-dev")
    transformers_model(family).config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()
