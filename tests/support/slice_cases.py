"""Small models of all families that SGLang's ranks can cut, and layouts of the policy that feeds them."""

from __future__ import annotations

SIZES = {
    "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4,
    "num_query_groups": 2, "kv_channels": 16, "max_sequence_length": 128, "qk_layernorm": False,
    "add_qkv_bias": False, "tie_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 128, "qk_layernorm": True}
BLOCKS = {"hidden_size": 256, "kv_channels": 128, "ffn_hidden_size": 512, "moe_ffn_hidden_size": 512}
"""Sizes of which two ranks' slices are whole FP8 blocks."""
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "llama, tied": {"tie_embeddings": True},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "mistral": {"rope_scaling.type": "linear", "rope_scaling.factor": 2.0},
    "qwen3_moe": EXPERTS,
    "llama in blocks": {k: v for k, v in BLOCKS.items() if not k.startswith("moe")},
    "qwen3_moe in blocks": EXPERTS | BLOCKS,
}

TP2 = "policy.tensor_model_parallel_size=2,policy.sequence_parallel=true"
TP4 = "policy.tensor_model_parallel_size=4,policy.sequence_parallel=true"
PP2 = "policy.pipeline_model_parallel_size=2"
VPP2, EP2 = "policy.virtual_pipeline_model_parallel_size=2", "policy.expert_model_parallel_size=2"
ETP1 = "policy.expert_tensor_parallel_size=1"


def model_overrides(sizes: dict[str, object]) -> list[str]:
    """Settings of a recipe for a model in bf16, sent in several small buckets."""
    model = [f"policy.model.{key}={str(value).lower()}" for key, value in (SIZES | sizes).items()]
    return [*model, "policy.dtype=bf16", "policy.weight_bucket_mib=0.1", "rollout.routing_replay=false"]
