"""Small models of the supported families, and the same models in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opo_megatron.config.choices import RopeType
from opo_megatron.config.schema import ModelConfig, RopeScalingConfig
from tests.support.requirements import require

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
WHOLE_BLOCKS = {
    "qwen3 of whole blocks": replace(QWEN3, hidden_size=128, ffn_hidden_size=384, kv_channels=64),
    "qwen2 of some whole blocks": replace(
        QWEN2, hidden_size=256, ffn_hidden_size=200, num_attention_heads=4, num_query_groups=2, kv_channels=64
    ),
    "qwen3_moe of whole blocks": replace(
        QWEN3_MOE, hidden_size=128, kv_channels=64, moe_ffn_hidden_size=256, ffn_hidden_size=128
    ),
}
"""Models with matrices whose dimensions are multiples of 128 (FP8 blocks)."""


def transformers_config(family: str, num_layers: int = 2) -> Any:
    """The family's transformers configuration."""
    transformers, model = require("transformers", "make setup-dev"), (FAMILIES | WHOLE_BLOCKS)[family]
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
        "num_hidden_layers": num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "rms_norm_eps": model.layernorm_epsilon,
        "max_position_embeddings": model.max_sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": rope,
    }
    name = family.replace(" ", ",").partition(",")[0]
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


def transformers_model(family: str, num_layers: int = 2) -> Any:
    """The same architecture built by transformers, in float32 and evaluation mode."""
    config = transformers_config(family, num_layers)
    transformers = require("transformers", "make setup-dev")
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def save_random_model(family: str, folder: Path, num_layers: int = 2, shard_size: str = "5GB") -> Any:
    """Saves a model with random norms and biases too, so that swapped tensors differ.

    Returns:
        The model, in float32.
    """
    torch.manual_seed(sum(map(ord, family)))
    model = transformers_model(family, num_layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(3)  # distributions far from uniform
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [20, 0, 19], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 2]]


@torch.no_grad()
def log_probs_of(model: Any) -> list[float]:
    """log π of every token of PROMPTS but the first of each, one forward pass per prompt."""
    log_probs: list[float] = []
    for prompt in PROMPTS:
        logits = model(torch.tensor([prompt])).logits[0, :-1].double()
        log_probs += logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:]).unsqueeze(1))[:, 0].tolist()
    return log_probs


def transformers_model_with(family: str, weights: dict[str, Tensor], folder: Path) -> Any:
    """`transformers_model` with `weights`, loaded from a folder by `from_pretrained`."""
    transformers = require("transformers", "make setup-dev")
    transformers_model(family).config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()
