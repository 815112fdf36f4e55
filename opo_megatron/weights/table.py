"""The table: every parameter of the policy, where it lives, and the Hugging Face tensors it holds.

Names are those of Llama, Qwen3 and Qwen3-MoE on one side and of Megatron's local layer spec on the
other.  The table is made from the recipe alone, so every rank holds the same one, whatever part of
the model is its own: that is what lets a receiver know the shapes of what it is about to receive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from opo_megatron.config.schema import ModelConfig
from opo_megatron.weights.layouts import GateUp, Layout, QueryKeyValue, Replicated, Sharded, Vocabulary

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter, or with experts the j-th local one of every expert-parallel rank."""

    local_name: str
    """In its chunk, e.g. `decoder.layers.0.mlp.linear_fc1.weight`."""
    layout: Layout
    tensors: tuple[tuple[tuple[str, Shape], ...], ...]
    """Per expert-parallel rank (one entry where there are no experts): its (name, shape) tensors."""
    stage: int
    """Pipeline rank that owns it."""
    chunk: int
    """Virtual stage there."""
    is_expert: bool = False
    is_copy: bool = False
    """The last stage's copy of a tied embedding: loaded, never streamed."""

    @property
    def numel(self) -> int:
        """Elements of all its Hugging Face tensors."""
        return sum(math.prod(shape) for rank in self.tensors for _, shape in rank)


@dataclass(frozen=True)
class Stages:
    """How layers lie on pipeline ranks and their virtual stages."""

    layers: int
    pipeline: int = 1
    virtual: int = 1

    def place(self, layer: int) -> tuple[int, int, int]:
        """(pipeline rank, virtual stage, index in that chunk) of a layer."""
        per_chunk = self.layers // (self.pipeline * self.virtual)
        chunk = layer // per_chunk
        return chunk % self.pipeline, chunk // self.pipeline, layer % per_chunk


def parameters(
    model: ModelConfig, vocab_size: int, stages: Stages, ep_size: int = 1, padded_vocab: int | None = None
) -> list[Parameter]:
    """All parameters, in the order in which they are streamed."""
    vocabulary, hidden = Vocabulary(vocab_size, padded_vocab), model.hidden_size
    stage, chunk = stages.pipeline - 1, stages.virtual - 1
    embedding = ((("model.embed_tokens.weight", (vocab_size, hidden)),),)
    table = [Parameter("embedding.word_embeddings.weight", vocabulary, embedding, stage=0, chunk=0)]
    for layer in range(model.num_layers):
        table.extend(_layer(model, layer, stages, ep_size))
    norm = ((("model.norm.weight", (hidden,)),),)
    table.append(Parameter("decoder.final_layernorm.weight", Replicated(), norm, stage, chunk))
    if not model.tie_embeddings:
        head = ((("lm_head.weight", (vocab_size, hidden)),),)
        table.append(Parameter("output_layer.weight", vocabulary, head, stage, chunk))
    elif stages.pipeline > 1:
        table.append(Parameter("output_layer.weight", vocabulary, embedding, stage, chunk, is_copy=True))
    return table


def hf_shapes(model: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """Every Hugging Face tensor of the model and its shape."""
    table = parameters(model, vocab_size, Stages(model.num_layers))
    return {name: shape for parameter in table for rank in parameter.tensors for name, shape in rank}


def _layer(model: ModelConfig, layer: int, stages: Stages, ep_size: int) -> Iterator[Parameter]:
    stage, chunk, local = stages.place(layer)
    ours, theirs = f"decoder.layers.{local}.", f"model.layers.{layer}."

    def dense(name: str, layout: Layout, *tensors: tuple[str, Shape]) -> Parameter:
        named = tuple((theirs + hf_name, shape) for hf_name, shape in tensors)
        return Parameter(ours + name, layout, (named,), stage, chunk)

    assert model.num_query_groups is not None and model.kv_channels is not None
    hidden, width = model.hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * width, model.num_query_groups * width
    yield dense("input_layernorm.weight", Replicated(), ("input_layernorm.weight", (hidden,)))
    yield dense(
        "self_attention.linear_qkv.weight",
        QueryKeyValue.of(model),
        ("self_attn.q_proj.weight", (queries, hidden)),
        ("self_attn.k_proj.weight", (keys, hidden)),
        ("self_attn.v_proj.weight", (keys, hidden)),
    )
    if model.qk_layernorm:
        yield dense("self_attention.q_layernorm.weight", Replicated(), ("self_attn.q_norm.weight", (width,)))
        yield dense("self_attention.k_layernorm.weight", Replicated(), ("self_attn.k_norm.weight", (width,)))
    output = ("self_attn.o_proj.weight", (hidden, queries))
    yield dense("self_attention.linear_proj.weight", Sharded(1), output)
    yield dense("pre_mlp_layernorm.weight", Replicated(), ("post_attention_layernorm.weight", (hidden,)))
    if model.num_moe_experts is None:
        ffn = model.ffn_hidden_size
        gate_up = (("mlp.gate_proj.weight", (ffn, hidden)), ("mlp.up_proj.weight", (ffn, hidden)))
        yield dense("mlp.linear_fc1.weight", GateUp(), *gate_up)
        yield dense("mlp.linear_fc2.weight", Sharded(1), ("mlp.down_proj.weight", (hidden, ffn)))
    else:
        yield dense("mlp.router.weight", Replicated(), ("mlp.gate.weight", (model.num_moe_experts, hidden)))
        yield from _experts(model, ours, theirs, stage, chunk, ep_size)


def _experts(
    model: ModelConfig, ours: str, theirs: str, stage: int, chunk: int, ep_size: int
) -> Iterator[Parameter]:
    assert model.num_moe_experts is not None and model.moe_ffn_hidden_size is not None
    hidden, ffn = model.hidden_size, model.moe_ffn_hidden_size
    local_experts = model.num_moe_experts // ep_size
    for j in range(local_experts):
        prefixes = [f"{theirs}mlp.experts.{rank * local_experts + j}." for rank in range(ep_size)]
        names = f"{ours}mlp.experts.local_experts.{j}."
        gate_up = tuple(
            ((p + "gate_proj.weight", (ffn, hidden)), (p + "up_proj.weight", (ffn, hidden))) for p in prefixes
        )
        down = tuple(((p + "down_proj.weight", (hidden, ffn)),) for p in prefixes)
        yield Parameter(names + "linear_fc1.weight", GateUp(), gate_up, stage, chunk, is_expert=True)
        yield Parameter(names + "linear_fc2.weight", Sharded(1), down, stage, chunk, is_expert=True)
