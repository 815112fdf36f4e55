"""What each rank of an SGLang server holds, from its source and none of this project's tables."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig


def held_by(
    model: ModelConfig, vocab: int, source: Callable[[str], Tensor], rank: int, tp: int, ep: int = 1
) -> dict[str, Tensor]:
    """Name → tensor of rank `rank` of `tp`, whose experts are distributed over `ep`."""
    assert model.num_query_groups is not None
    key_ranks = min(tp, model.num_query_groups)
    key_rank = rank * key_ranks // tp

    def vocabulary(name: str) -> Tensor:
        full = source(name)
        rows = -(-vocab // 64) * 64
        rows = rows if rows % tp == 0 else -(-vocab // (64 * tp)) * 64 * tp
        return torch.cat((full, full.new_zeros(rows - vocab, full.shape[1]))).chunk(tp)[rank]

    def mlp(prefix: str, ranks: int, part: int) -> tuple[Tensor, Tensor]:
        both = [source(f"{prefix}{name}_proj.weight").chunk(ranks)[part] for name in ("gate", "up")]
        return torch.cat(both), source(f"{prefix}down_proj.weight").chunk(ranks, 1)[part]

    held = {"model.embed_tokens.weight": vocabulary("model.embed_tokens.weight")}
    for i in range(model.num_layers):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        for kind in ["weight", "bias"] if model.add_qkv_bias else ["weight"]:
            query = source(f"{attention}q_proj.{kind}").chunk(tp)[rank]
            keys = [source(f"{attention}{n}_proj.{kind}").chunk(key_ranks)[key_rank] for n in "kv"]
            held[f"{attention}qkv_proj.{kind}"] = torch.cat([query, *keys])
        for n in "qk" if model.qk_layernorm else "":
            held[f"{attention}{n}_norm.weight"] = source(f"{attention}{n}_norm.weight")
        held[f"{attention}o_proj.weight"] = source(f"{attention}o_proj.weight").chunk(tp, 1)[rank]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            held[f"{layer}{norm}.weight"] = source(f"{layer}{norm}.weight")
        if model.num_moe_experts is None:
            both = mlp(f"{layer}mlp.", tp, rank)
            held[f"{layer}mlp.gate_up_proj.weight"], held[f"{layer}mlp.down_proj.weight"] = both
            continue
        held[f"{layer}mlp.gate.weight"] = source(f"{layer}mlp.gate.weight")
        inner, count = tp // ep, model.num_moe_experts // ep
        own = range(rank // inner * count, (rank // inner + 1) * count)
        experts = [mlp(f"{layer}mlp.experts.{e}.", inner, rank % inner) for e in own]
        held[f"{layer}mlp.experts.w13_weight"] = torch.stack([w13 for w13, _ in experts])
        held[f"{layer}mlp.experts.w2_weight"] = torch.stack([w2 for _, w2 in experts])
    held["model.norm.weight"] = source("model.norm.weight")
    if not model.tie_embeddings:
        held["lm_head.weight"] = vocabulary("lm_head.weight")
    return held
