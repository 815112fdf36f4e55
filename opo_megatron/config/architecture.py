"""Model families: from a Hugging Face `config.json` to `policy.model`, and back.

Options that Megatron-Core 0.16.1 cannot compute exactly as the family's own code are refused by name, because
a nearly right model trains without an error.  The file is read as JSON: importing transformers takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from opo_megatron.config.choices import RopeType
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
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no config.json; name the folder of a Hugging Face model") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a JSON object; download it again")
    reader = _Reader(raw, path)
    family = reader.family()
    reader.refuse_unsupported(family)
    return Architecture(
        family, reader.model(family), reader.sliding_window(family), raw.get("dtype", raw.get("torch_dtype"))
    )


def adopt_architecture(config: Config, given: Set[str]) -> None:
    """Set `config.policy.model` to the architecture of the folder `policy.init_from`, in place.

    Args:
        given: full keys that the recipe or the command line sets.

    Raises:
        UserError: where one of these contradicts the folder.
    """
    assert config.policy.init_from is not None
    folder, model = Path(config.policy.init_from), config.policy.model
    if not folder.is_dir():
        raise UserError(f"policy.init_from={folder} is not a folder; name the folder of a model")
    architecture = read_architecture(folder)
    longest = architecture.model.max_sequence_length
    if "policy.model.max_sequence_length" not in given:
        model.max_sequence_length = min(model.max_sequence_length, longest)
    if model.max_sequence_length > longest:
        raise UserError(
            f"policy.model.max_sequence_length is {model.max_sequence_length}, but the model in "
            f"policy.init_from={folder} has {longest} positions; lower the first"
        )
    if architecture.sliding_window is not None and architecture.sliding_window < model.max_sequence_length:
        raise UserError(
            f"the model in policy.init_from={folder} attends only to the last {architecture.sliding_window} "
            "tokens, which is not supported; set policy.model.max_sequence_length to at most that"
        )
    _merge(model, architecture.model, "policy.model.", given - {"policy.model.max_sequence_length"}, folder)


def _merge(recipe: Any, stored: Any, prefix: str, given: Set[str], folder: Path) -> None:
    """Copy the fields of the folder's section into the recipe's."""
    for field in fields(recipe):
        key, old, new = prefix + field.name, getattr(recipe, field.name), getattr(stored, field.name)
        if is_dataclass(old):
            _merge(old, new, key + ".", given, folder)
        elif key in given and old != new:
            raise UserError(
                f"{key} is {_text(old)}, but the model in policy.init_from={folder} has {_text(new)}; "
                f"remove {key} from the recipe"
            )
        elif field.name != "max_sequence_length":
            setattr(recipe, field.name, new)


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


class _Reader:
    """One `config.json`: typed access, errors that name the file, and the model that it describes."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def family(self) -> Family:
        model_type, classes = self.raw.get("model_type"), self.raw.get("architectures") or []
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None or (classes and family.architecture not in classes):
            name = f"{model_type} ({', '.join(classes)})" if classes else str(model_type)
            raise UserError(
                f"{self.path} describes a model of type {name}, which is not supported; "
                f"supported are {', '.join(f.architecture for f in FAMILIES.values())}"
            )
        return family

    def refuse_unsupported(self, family: Family) -> None:
        raw = self.raw
        activation = raw.get("hidden_act", "silu")
        layer_types = set(raw.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
        unsupported: list[tuple[Any, str]] = [
            (raw.get("attention_bias"), "attention_bias=true, a bias of the attention's output"),
            (raw.get("mlp_bias"), "mlp_bias=true"),
            (activation not in ("silu", "swish"), f"hidden_act={activation}"),
            (raw.get("quantization_config"), "quantized weights (quantization_config)"),
            (layer_types, f"layer_types={', '.join(sorted(layer_types))}"),
            (raw.get("attention_dropout"), f"attention_dropout={raw.get('attention_dropout')}"),
        ]
        if family.has_experts:
            step = raw.get("decoder_sparse_step", 1)
            unsupported += [
                (raw.get("mlp_only_layers"), f"mlp_only_layers={raw.get('mlp_only_layers')}"),
                (step != 1, f"decoder_sparse_step={step}, layers without experts"),
            ]
        for is_present, what in unsupported:
            if is_present:
                raise UserError(f"{self.path} has {what}, which is not supported; use another model")

    def model(self, family: Family) -> ModelConfig:
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        head_dim = self.raw.get("head_dim") or family.default_head_dim or hidden // heads
        model = ModelConfig(
            num_layers=self.integer("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=self.integer("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=self.integer("num_key_value_heads", heads),
            kv_channels=head_dim,
            qk_layernorm=family.qk_layernorm,
            add_qkv_bias=family.add_qkv_bias,
            tie_embeddings=bool(self.raw.get("tie_word_embeddings", False)),
            layernorm_epsilon=float(self.raw.get("rms_norm_eps", 1e-6)),
            vocab_size=self.integer("vocab_size"),
            max_sequence_length=self.integer("max_position_embeddings"),
        )
        self.set_rope(model)
        if family.has_experts:
            # transformers 5 writes num_local_experts, published files have num_experts.
            name = "num_local_experts" if "num_local_experts" in self.raw else "num_experts"
            model.num_moe_experts = self.integer(name)
            model.moe_router_topk = self.integer("num_experts_per_tok")
            model.moe_ffn_hidden_size = self.integer("moe_intermediate_size")
            # Normalized over the selected experts, the softmax over all is the softmax over the selected.
            model.moe_router_pre_softmax = not self.raw.get("norm_topk_prob", False)
        return model

    def set_rope(self, model: ModelConfig) -> None:
        raw = self.raw
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # transformers' precedence
        kind = rope.get("rope_type", rope.get("type", "default"))
        fraction = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if fraction not in (None, 1):
            raise UserError(
                f"{self.path} rotates {fraction} of each head, which is not supported; use another"
            )
        if any(isinstance(value, dict) for value in rope.values()):
            kind = "a rule per layer type"
        if kind not in ("default", "linear", "llama3"):
            raise UserError(
                f"{self.path} scales rotary embeddings by {kind}, which is not supported; supported are "
                "default, linear and llama3"
            )
        model.rotary_base = float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
        if kind == "default":
            return
        names = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
        for name in names:
            if not isinstance(rope.get(name), int | float):
                raise UserError(f"{self.path} scales rotary embeddings by {kind} without a {name}; add it")
        scaling = RopeScalingConfig(RopeType(kind))
        for name in names:
            setattr(scaling, name, float(rope[name]))
        if kind == "llama3":
            original = rope.get("original_max_position_embeddings", model.max_sequence_length)
            scaling.original_max_sequence_length = raw.get("original_max_position_embeddings", original)
        model.rope_scaling = scaling

    def sliding_window(self, family: Family) -> int | None:
        if family.window == "none":
            return None
        if family.window == "switched":
            if not self.raw.get("use_sliding_window", False):
                return None
            types, first = self.raw.get("layer_types"), self.raw.get("max_window_layers")
            is_full = types is not None and "sliding_attention" not in types
            if not family.has_experts and types is None and first is not None:
                is_full = first >= self.integer("num_hidden_layers")
            if is_full:
                return None
        window = self.raw.get("sliding_window", family.default_window)
        return None if window is None else int(window)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or value < 1:
            raise UserError(
                f"{self.path} has {key}={value}, which is not a positive integer; download it again"
            )
        return value


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
