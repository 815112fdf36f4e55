"""Small models of the families that the project trains, and their counterparts in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import require
from safetensors.torch import save_file
from torch import Tensor

from opo_megatron.config.schema import ModelConfig

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
FAMILIES = {"llama": LLAMA, "qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}


def transformers_model(family: str) -> Any:
    """The same architecture built by transformers, in float32 and evaluation mode."""
    transformers, model = require("transformers", "make setup-dev"), FAMILIES[family]
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
    }
    if family == "llama":
        config = transformers.LlamaConfig(**shape)
    elif family == "qwen3":
        config = transformers.Qwen3Config(**shape)
    else:
        config = transformers.Qwen3MoeConfig(
            **shape,
            num_experts=model.num_moe_experts,
            num_experts_per_tok=model.moe_router_topk,
            moe_intermediate_size=model.moe_ffn_hidden_size,
            norm_topk_prob=True,
        )
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
