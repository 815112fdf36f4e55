"""Architectures of published models, so that a plan needs no download.

Source: the `config.json` of each model on the Hugging Face hub; only what sizes and speed depend on.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

from opo_megatron.config.architecture import hf_config
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError


def _llama3(layers: int, hidden: int, ffn: int, heads: int, positions: int = 131072) -> ModelConfig:
    return ModelConfig(
        layers, hidden, ffn, heads, 8, hidden // heads, vocab_size=128256, rotary_base=500000.0,
        layernorm_epsilon=1e-5, max_sequence_length=positions,
    )  # fmt: skip


def _qwen3(layers: int, hidden: int, ffn: int, heads: int) -> ModelConfig:
    return ModelConfig(
        layers, hidden, ffn, heads, 8, 128, qk_layernorm=True, vocab_size=151936, rotary_base=1e6,
        max_sequence_length=40960,
    )  # fmt: skip


def _qwen3_moe(layers: int, hidden: int, ffn: int, heads: int, groups: int, expert_ffn: int) -> ModelConfig:
    return ModelConfig(
        layers, hidden, ffn, heads, groups, 128, qk_layernorm=True, vocab_size=151936, rotary_base=1e6,
        max_sequence_length=40960, num_moe_experts=128, moe_router_topk=8, moe_ffn_hidden_size=expert_ffn,
    )  # fmt: skip


def _qwen2(layers: int, hidden: int, ffn: int, heads: int, groups: int) -> ModelConfig:
    return ModelConfig(
        layers, hidden, ffn, heads, groups, 128, add_qkv_bias=True, vocab_size=152064, rotary_base=1e6,
        max_sequence_length=32768,
    )  # fmt: skip


MODELS = {
    "Llama-3-8B": _llama3(32, 4096, 14336, 32, 8192),
    "Llama-3-70B": _llama3(80, 8192, 28672, 64, 8192),
    "Llama-3.1-8B": _llama3(32, 4096, 14336, 32),
    "Llama-3.1-70B": _llama3(80, 8192, 28672, 64),
    "Llama-3.3-70B": _llama3(80, 8192, 28672, 64),
    "Qwen3-8B": _qwen3(36, 4096, 12288, 32),
    "Qwen3-14B": _qwen3(40, 5120, 17408, 40),
    "Qwen3-32B": _qwen3(64, 5120, 25600, 64),
    "Qwen3-30B-A3B": _qwen3_moe(48, 2048, 6144, 32, 4, 768),
    "Qwen3-235B-A22B": _qwen3_moe(94, 4096, 12288, 64, 4, 1536),
    "Qwen2.5-7B": _qwen2(28, 3584, 18944, 28, 4),
    "Qwen2.5-32B": _qwen2(64, 5120, 27648, 40, 8),
    "Qwen2.5-72B": _qwen2(80, 8192, 29568, 64, 8),
    "DeepSeek-R1-Distill-Qwen-7B": _qwen2(28, 3584, 18944, 28, 4),
}


def folder_of(name: str, scratch: Path) -> str:
    """The folder `name` if it exists, else a folder with the `config.json` of the model of that name.

    Args:
        scratch: an empty folder.

    Raises:
        UserError: for what is neither a folder nor in `MODELS`, naming a similar model.
    """
    if Path(name).is_dir():
        return name
    lowered = Path(name).name.lower()
    names = {model.lower(): model for model in MODELS}
    base = lowered.removesuffix("-instruct").removesuffix("-base").replace("meta-llama-", "llama-")
    if base not in names:
        nearest = difflib.get_close_matches(base, names, 1, cutoff=0.0)[0]
        raise UserError(
            f"policy.init_from={name} is neither a folder nor a model that the planner knows by name; give a "
            f"folder with the model's config.json, or a name like {names[nearest]}"
        )
    content = hf_config(MODELS[names[base]], "bfloat16")
    (scratch / "config.json").write_text(json.dumps(content))
    return str(scratch)
