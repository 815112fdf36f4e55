"""The parameter mapping: every Megatron parameter, its rank and sharding, and its Hugging Face tensors.

A `ParamSpec` maps one Megatron parameter, by its name in either layer spec, to Hugging Face tensors and
their sharding, and to the tensor of SGLang that holds them.  Transformer Engine's spec fuses a norm into the
following linear layer and the experts of a layer into one module, so some names differ.  Features of the
`ModelConfig` select the specs of a model family; a family with other tensors needs further specs.

The mapping depends on the recipe alone, so it is the same on every rank: a receiver knows the shapes of
what it receives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from opo_megatron.config.schema import ModelConfig
from opo_megatron.weights.sharding import GateUp, QueryKeyValue, Replicated, Sharded, Sharding, Vocabulary

Shape = tuple[int, ...]
LayerSpec = Literal["local", "transformer_engine"]
"""The Megatron layer spec whose parameter names are used."""


def _dense(model: ModelConfig) -> bool:
    return model.num_moe_experts is None


def _sparse(model: ModelConfig) -> bool:
    return model.num_moe_experts is not None


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of every layer."""

    mcore_name: str
    """Name in the local layer spec; {j} is a local expert."""
    tensors: dict[str, str]
    """Hugging Face name in the layer → dimensions, as named by `_dimensions`; {e} is an expert."""
    sharding: Callable[[ModelConfig], Sharding]
    when: Callable[[ModelConfig], bool] = lambda model: True
    transformer_engine: str | None = None
    """Name in Transformer Engine's spec where it differs."""
    sglang: str | None = None
    """SGLang's name in the layer, where it is not that of the only Hugging Face tensor; all experts of a rank
    are one tensor."""

    @property
    def engine_name(self) -> str:
        return self.sglang or next(iter(self.tensors))

    @property
    def is_expert(self) -> bool:
        return "{j}" in self.mcore_name


_REPLICATED: Callable[[ModelConfig], Sharding] = lambda model: Replicated()  # noqa: E731
_ROW_PARALLEL: Callable[[ModelConfig], Sharding] = lambda model: Sharded(1)  # noqa: E731
_GATE_UP: Callable[[ModelConfig], Sharding] = lambda model: GateUp()  # noqa: E731

PARAM_SPECS = (
    ParamSpec(
        "input_layernorm.weight",
        {"input_layernorm.weight": "hidden"},
        _REPLICATED,
        transformer_engine="self_attention.linear_qkv.layer_norm_weight",
    ),
    ParamSpec(
        "self_attention.linear_qkv.weight",
        {
            "self_attn.q_proj.weight": "queries hidden",
            "self_attn.k_proj.weight": "keys hidden",
            "self_attn.v_proj.weight": "keys hidden",
        },
        QueryKeyValue.of,
        sglang="self_attn.qkv_proj.weight",
    ),
    ParamSpec(
        "self_attention.linear_qkv.bias",
        {
            "self_attn.q_proj.bias": "queries",
            "self_attn.k_proj.bias": "keys",
            "self_attn.v_proj.bias": "keys",
        },
        QueryKeyValue.of,
        when=lambda model: model.add_qkv_bias,
        sglang="self_attn.qkv_proj.bias",
    ),
    ParamSpec(
        "self_attention.q_layernorm.weight",
        {"self_attn.q_norm.weight": "head_dim"},
        _REPLICATED,
        when=lambda model: model.qk_layernorm,
    ),
    ParamSpec(
        "self_attention.k_layernorm.weight",
        {"self_attn.k_norm.weight": "head_dim"},
        _REPLICATED,
        when=lambda model: model.qk_layernorm,
    ),
    ParamSpec(
        "self_attention.linear_proj.weight",
        {"self_attn.o_proj.weight": "hidden queries"},
        _ROW_PARALLEL,
    ),
    ParamSpec(
        "pre_mlp_layernorm.weight",
        {"post_attention_layernorm.weight": "hidden"},
        _REPLICATED,
        when=_dense,
        transformer_engine="mlp.linear_fc1.layer_norm_weight",
    ),
    ParamSpec(
        "mlp.linear_fc1.weight",
        {"mlp.gate_proj.weight": "ffn hidden", "mlp.up_proj.weight": "ffn hidden"},
        _GATE_UP,
        when=_dense,
        sglang="mlp.gate_up_proj.weight",
    ),
    ParamSpec("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}, _ROW_PARALLEL, when=_dense),
    # Before experts the norm is not fused in either spec: the router needs its output too.
    ParamSpec(
        "pre_mlp_layernorm.weight",
        {"post_attention_layernorm.weight": "hidden"},
        _REPLICATED,
        when=_sparse,
    ),
    ParamSpec("mlp.router.weight", {"mlp.gate.weight": "experts hidden"}, _REPLICATED, when=_sparse),
    ParamSpec(
        "mlp.experts.local_experts.{j}.linear_fc1.weight",
        {
            "mlp.experts.{e}.gate_proj.weight": "moe_ffn hidden",
            "mlp.experts.{e}.up_proj.weight": "moe_ffn hidden",
        },
        _GATE_UP,
        when=_sparse,
        transformer_engine="mlp.experts.linear_fc1.weight{j}",
        sglang="mlp.experts.w13_weight",
    ),
    ParamSpec(
        "mlp.experts.local_experts.{j}.linear_fc2.weight",
        {"mlp.experts.{e}.down_proj.weight": "hidden moe_ffn"},
        _ROW_PARALLEL,
        when=_sparse,
        transformer_engine="mlp.experts.linear_fc2.weight{j}",
        sglang="mlp.experts.w2_weight",
    ),
)
"""The parameters of a layer, in streaming order."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def is_expert(name: str) -> bool:
    """Whether a Hugging Face tensor belongs to an expert."""
    return ".experts." in name


def _dimensions(model: ModelConfig) -> dict[str, int]:
    assert model.num_query_groups is not None and model.kv_channels is not None
    return {
        "hidden": model.hidden_size,
        "head_dim": model.kv_channels,
        "queries": model.num_attention_heads * model.kv_channels,
        "keys": model.num_query_groups * model.kv_channels,
        "ffn": model.ffn_hidden_size,
        "experts": model.num_moe_experts or 0,
        "moe_ffn": model.moe_ffn_hidden_size or 0,
    }


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter; for experts, the j-th local expert of every expert-parallel rank."""

    mcore_name: str
    """Name in its model chunk, e.g. `decoder.layers.0.mlp.linear_fc1.weight`."""
    sharding: Sharding
    tensors: tuple[tuple[tuple[str, Shape], ...], ...]
    """(name, shape) of its tensors per expert-parallel rank; one entry for other parameters."""
    stage: int
    """Pipeline rank that owns it."""
    chunk: int
    """Virtual stage on that rank."""
    is_expert: bool = False
    tied_duplicate: bool = False
    """The last stage's copy of a tied embedding: loaded, never streamed."""
    engine_name: str = field(kw_only=True)
    """SGLang's tensor, which it fills or, as one of its experts, is a part of."""

    @property
    def numel(self) -> int:
        """Number of elements of all its Hugging Face tensors."""
        return sum(math.prod(shape) for rank in self.tensors for _, shape in rank)


@dataclass(frozen=True)
class Stages:
    """Assignment of layers to pipeline ranks and their virtual stages."""

    layers: int
    pipeline: int = 1
    virtual: int = 1

    def place(self, layer: int) -> tuple[int, int, int]:
        """(pipeline rank, virtual stage, index in that chunk) of a layer."""
        per_chunk = self.layers // (self.pipeline * self.virtual)
        chunk = layer // per_chunk
        return chunk % self.pipeline, chunk // self.pipeline, layer % per_chunk


def parameters(
    model: ModelConfig,
    vocab_size: int,
    stages: Stages,
    ep_size: int = 1,
    padded_vocab: int | None = None,
    spec: LayerSpec = "local",
) -> list[Parameter]:
    """The parameter mapping, in streaming order."""
    vocabulary, hidden = Vocabulary(vocab_size, padded_vocab), model.hidden_size
    stage, chunk = stages.pipeline - 1, stages.virtual - 1
    embedding = (((EMBEDDING, (vocab_size, hidden)),),)
    embed = partial(Parameter, sharding=vocabulary, tensors=embedding, engine_name=EMBEDDING)
    mapping = [embed("embedding.word_embeddings.weight", stage=0, chunk=0)]
    for layer in range(model.num_layers):
        mapping.extend(_layer(model, layer, stages, ep_size, spec))
    norm = (((FINAL_NORM, (hidden,)),),)
    final = "decoder.final_layernorm.weight"
    mapping.append(Parameter(final, Replicated(), norm, stage, chunk, engine_name=FINAL_NORM))
    if not model.tie_embeddings:
        head = (((HEAD, (vocab_size, hidden)),),)
        mapping.append(Parameter("output_layer.weight", vocabulary, head, stage, chunk, engine_name=HEAD))
    elif stages.pipeline > 1:
        mapping.append(embed("output_layer.weight", stage=stage, chunk=chunk, tied_duplicate=True))
    return mapping


def hf_shapes(model: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """Name → shape of every Hugging Face tensor of the model."""
    mapping = parameters(model, vocab_size, Stages(model.num_layers))
    return {name: shape for parameter in mapping for rank in parameter.tensors for name, shape in rank}


def _layer(
    model: ModelConfig, layer: int, stages: Stages, ep_size: int, spec: LayerSpec
) -> Iterator[Parameter]:
    stage, chunk, index = stages.place(layer)
    sizes, local_experts = _dimensions(model), (model.num_moe_experts or 0) // ep_size
    for entry in (entry for entry in PARAM_SPECS if entry.when(model)):
        name = (
            entry.mcore_name
            if spec == "local" or entry.transformer_engine is None
            else entry.transformer_engine
        )
        shapes = {
            hf_name: tuple(sizes[dimension] for dimension in dimensions.split())
            for hf_name, dimensions in entry.tensors.items()
        }
        for j in range(local_experts if entry.is_expert else 1):
            experts = [rank * local_experts + j for rank in range(ep_size)] if entry.is_expert else [0]
            tensors = tuple(
                tuple((f"model.layers.{layer}.{n.format(e=e)}", shape) for n, shape in shapes.items())
                for e in experts
            )
            mcore_name = f"decoder.layers.{index}.{name.format(j=j)}"
            yield Parameter(
                mcore_name,
                entry.sharding(model),
                tensors,
                stage,
                chunk,
                entry.is_expert,
                engine_name=f"model.layers.{layer}.{entry.engine_name}",
            )
