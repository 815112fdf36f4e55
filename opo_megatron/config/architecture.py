"""Model families: from a Hugging Face `config.json` to `policy.model`, and back.

Options that Megatron-Core cannot compute exactly as the family's own code are refused by name, because a
nearly right model trains without an error.  The file is read as JSON: importing transformers takes seconds.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from opo_megatron.config.choices import RopeType
from opo_megatron.config.json_fields import JsonFields, read_json_object
from opo_megatron.config.schema import Config, ModelConfig, RopeScalingConfig
from opo_megatron.errors import UserError


@dataclass(frozen=True)
class Family:
    """The properties of a family; all share Llama's tensor names, RMSNorm, SwiGLU and RoPE."""

    model_type: str
    architecture: str
    """The class in `config.json`."""
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    has_experts: bool = False
    window: Literal["none", "always", "switched"] = "none"
    """When `sliding_window` applies: never, wherever it is not null, or only with `use_sliding_window`."""
    default_window: int | None = None
    """`sliding_window` if the file has none."""
    default_head_dim: int | None = None
    """`head_dim` if the file has none; None is hidden_size / num_attention_heads."""
    even_heads: bool = False
    """transformers rejects heads that do not divide the hidden size, even with a head_dim."""

    def expresses(self, model: ModelConfig) -> bool:
        """Whether a model that a recipe defines belongs to this family."""
        return (
            self.add_qkv_bias == model.add_qkv_bias
            and self.qk_layernorm == model.qk_layernorm
            and self.has_experts == (model.num_moe_experts is not None)
            and not (self.even_heads and model.hidden_size % model.num_attention_heads)
        )


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", even_heads=True),
        Family("mistral", "MistralForCausalLM", window="always", default_window=4096),
        Family("qwen2", "Qwen2ForCausalLM", add_qkv_bias=True, window="switched"),
        Family("qwen3", "Qwen3ForCausalLM", qk_layernorm=True, window="switched", default_head_dim=128),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", qk_layernorm=True, has_experts=True, window="switched"),
    )
}


@dataclass(frozen=True)
class Architecture:
    """The content of a `config.json`."""

    family: Family
    model: ModelConfig
    """With the vocabulary, and with max_position_embeddings as its maximum sequence length."""
    sliding_window: int | None
    """Attention window in tokens, if limited."""
    dtype: str | None
    """Of the stored weights, by the file's name: float32, bfloat16, …"""


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises:
        UserError: for a folder without a readable `config.json`, or a model that is not supported.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} has no config.json; name the folder of a Hugging Face model")
    fields_of_file = JsonFields(read_json_object(path), path)
    reader = _Reader(fields_of_file)
    family = reader.family()
    reader.refuse_unsupported(family)
    dtype = fields_of_file.optional_text("dtype") or fields_of_file.optional_text("torch_dtype")
    return Architecture(family, reader.model(family), reader.sliding_window(family), dtype)


def adopt_architecture(config: Config, given: Set[str], folder: Path) -> None:
    """Set `config.policy.model` to the architecture of the model that `policy.init_from` names, in place.

    Args:
        given: full keys that the recipe or the command line sets.
        folder: where it is.  Errors name what the user wrote.

    Raises:
        UserError: where one of these contradicts the folder.
    """
    name, model = config.policy.init_from, config.policy.model
    if not folder.is_dir():
        raise UserError(f"policy.init_from={name} is not a folder; name the folder of a downloaded model")
    architecture = read_architecture(folder)
    longest = architecture.model.max_sequence_length
    if "policy.model.max_sequence_length" not in given:
        model.max_sequence_length = min(model.max_sequence_length, longest)
    if model.max_sequence_length > longest:
        raise UserError(
            f"policy.model.max_sequence_length is {model.max_sequence_length}, but the model in "
            f"policy.init_from={name} has {longest} positions; lower the first"
        )
    if architecture.sliding_window is not None and architecture.sliding_window < model.max_sequence_length:
        raise UserError(
            f"the model in policy.init_from={name} attends only to the last {architecture.sliding_window} "
            "tokens, which is not supported; set policy.model.max_sequence_length to at most that"
        )
    _merge(model, architecture.model, "policy.model.", given - {"policy.model.max_sequence_length"}, name)


def _merge(recipe: Any, stored: Any, prefix: str, given: Set[str], name: str | None) -> None:
    """Copy the fields of the stored model's section into the recipe's; `name` is that of the model."""
    for field in fields(recipe):
        key, old, new = prefix + field.name, getattr(recipe, field.name), getattr(stored, field.name)
        if is_dataclass(old):
            _merge(old, new, key + ".", given, name)
        elif key in given and old != new:
            raise UserError(
                f"{key} is {_text(old)}, but the model in policy.init_from={name} has {_text(new)}; "
                f"remove {key} from the recipe"
            )
        elif field.name != "max_sequence_length":
            setattr(recipe, field.name, new)


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


_ROPE_FIELDS = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor"),
    *("high_freq_factor", "original_max_position_embeddings"),
)
"""What is read of `rope_scaling`; an object under any other name is the rule of one type of layers."""


class _Reader:
    """The model that a `config.json` describes.

    `null` means what it means to transformers: no scaling, no window, heads of the usual number and size.
    """

    def __init__(self, fields: JsonFields) -> None:
        self.fields, self.path = fields, fields.path

    def family(self) -> Family:
        model_type, classes = self.fields.text("model_type"), self.fields.texts("architectures")
        family = FAMILIES.get(model_type)
        if family is None or (classes and family.architecture not in classes):
            name = f"{model_type} ({', '.join(classes)})" if classes else model_type
            raise UserError(
                f"{self.path} describes a model of type {name}, which is not supported; "
                f"supported are {', '.join(f.architecture for f in FAMILIES.values())}"
            )
        return family

    def refuse_unsupported(self, family: Family) -> None:
        fields = self.fields
        activation = fields.text("hidden_act", "silu")
        layer_types = set(fields.texts("layer_types")) - {"full_attention", "sliding_attention"}
        dropout = fields.number("attention_dropout", 0.0, null=True, or_zero=True)
        unsupported: list[tuple[Any, str]] = [
            (fields.flag("attention_bias", False), "attention_bias=true, a bias of the attention's output"),
            (fields.flag("mlp_bias", False), "mlp_bias=true"),
            (activation not in ("silu", "swish"), f"hidden_act={activation}"),
            (fields.mapping("quantization_config").raw, "quantized weights (quantization_config)"),
            (layer_types, f"layer_types={', '.join(sorted(layer_types))}"),
            (dropout, f"attention_dropout={dropout:g}"),
        ]
        if family.has_experts:
            step, dense_layers = fields.integer("decoder_sparse_step", 1), fields.raw.get("mlp_only_layers")
            unsupported += [
                (dense_layers, f"mlp_only_layers={dense_layers}"),
                (step != 1, f"decoder_sparse_step={step}, layers without experts"),
            ]
        for is_present, what in unsupported:
            if is_present:
                raise UserError(f"{self.path} has {what}, which is not supported; use another model")

    def model(self, family: Family) -> ModelConfig:
        fields = self.fields
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        model = ModelConfig(
            num_layers=fields.integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=fields.integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=fields.integer("num_key_value_heads", heads, null=True),
            kv_channels=fields.integer("head_dim", family.default_head_dim or hidden // heads, null=True),
            qk_layernorm=family.qk_layernorm,
            add_qkv_bias=family.add_qkv_bias,
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            layernorm_epsilon=fields.number("rms_norm_eps", 1e-6),
            vocab_size=fields.integer("vocab_size"),
            max_sequence_length=fields.integer("max_position_embeddings"),
        )
        self.set_rope(model)
        if family.has_experts:
            # transformers 5 writes num_local_experts, published files have num_experts.
            name = "num_local_experts" if "num_local_experts" in fields else "num_experts"
            model.num_moe_experts = fields.integer(name)
            model.moe_router_topk = fields.integer("num_experts_per_tok")
            model.moe_ffn_hidden_size = fields.integer("moe_intermediate_size")
            # Normalized over the selected experts, the softmax over all is the softmax over the selected.
            model.moe_router_pre_softmax = not fields.flag("norm_topk_prob", False)
        return model

    def set_rope(self, model: ModelConfig) -> None:
        fields = self.fields
        scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
        rope = scaling if scaling.raw else parameters  # transformers' precedence
        if any(isinstance(value, dict) for name, value in rope.raw.items() if name not in _ROPE_FIELDS):
            kind = "a rule per layer type"
        else:
            kind = rope.text("rope_type" if "rope_type" in rope else "type", "default")
        for place in (rope, fields):
            if (fraction := place.number("partial_rotary_factor", 1.0, null=True)) != 1:
                raise UserError(
                    f"{self.path} rotates {fraction:g} of each head, which is not supported; use another"
                )
        if kind not in ("default", "linear", "llama3"):
            raise UserError(
                f"{self.path} scales rotary embeddings by {kind}, which is not supported; supported are "
                "default, linear and llama3"
            )
        model.rotary_base = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
        if kind != "default":
            model.rope_scaling = self.rope_scaling(RopeType(kind), rope, model.max_sequence_length)

    def rope_scaling(self, kind: RopeType, rope: JsonFields, positions: int) -> RopeScalingConfig:
        result = RopeScalingConfig(kind)
        is_llama3 = kind is RopeType.llama3
        for name in ("factor", "low_freq_factor", "high_freq_factor") if is_llama3 else ("factor",):
            if name not in rope:
                raise UserError(
                    f"{self.path} scales rotary embeddings by {kind.value} without a {name}; add it"
                )
            setattr(result, name, rope.number(name))
        if is_llama3:
            name = "original_max_position_embeddings"
            result.original_max_sequence_length = self.fields.integer(name, rope.integer(name, positions))
        return result

    def sliding_window(self, family: Family) -> int | None:
        fields = self.fields
        if family.window == "none":
            return None
        if family.window == "switched":
            if not fields.flag("use_sliding_window", False):
                return None
            types = fields.texts("layer_types")
            is_full = bool(types) and "sliding_attention" not in types
            if not family.has_experts and not types and "max_window_layers" in fields:
                # The first layers attend to everything.
                is_full = fields.integer("max_window_layers") >= fields.integer("num_hidden_layers")
            if is_full:
                return None
        if fields.raw.get("sliding_window", family.default_window) is None:
            return None
        return fields.integer("sliding_window", family.default_window)


def hf_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """A `config.json` for a model that a recipe defines.

    Args:
        model: resolved, with its vocabulary.
        dtype: of the weights, by transformers' name.

    Raises:
        UserError: where no supported family has this model.
    """
    family = next((family for family in FAMILIES.values() if family.expresses(model)), None)
    if family is None:
        raise UserError(
            "no Hugging Face family has this combination of add_qkv_bias, qk_layernorm and experts, so the "
            "model cannot be exported"
        )
    scaling = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if scaling.type is not RopeType.none:
        rope |= {"rope_type": scaling.type.value, "factor": scaling.factor}
    if scaling.type is RopeType.llama3:
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_sequence_length,
        }
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": model.layernorm_epsilon,
        "max_position_embeddings": model.max_sequence_length,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": rope,
    }
    if family.window != "none":
        config["sliding_window"] = None
    if family.window == "switched":
        config["use_sliding_window"] = False
    if family.has_experts:
        config |= {
            "num_experts": model.num_moe_experts,
            "num_experts_per_tok": model.moe_router_topk,
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "norm_topk_prob": not model.moe_router_pre_softmax,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config
