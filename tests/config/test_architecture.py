"""config.json is read and written as transformers does; unsupported models are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opo_megatron.config import Config, load_config
from opo_megatron.config.architecture import hf_config, read_architecture
from opo_megatron.config.choices import RopeType
from opo_megatron.config.schema import ModelConfig, RopeScalingConfig
from opo_megatron.errors import UserError
from opo_megatron.kernels.rotary import inverse_frequencies
from opo_megatron.weights.param_mapping import hf_shapes
from tests.support.hf_models import FAMILIES, VOCAB_SIZE, transformers_config
from tests.support.requirements import require

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 21,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def folder_of(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def with_vocabulary(family: str) -> ModelConfig:
    return replace(FAMILIES[family], vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_written_by_transformers_reads_as_the_same_model(family: str, tmp_path: Path) -> None:
    config = transformers_config(family)
    config.architectures = [
        read_architecture(folder_of(tmp_path, config.to_dict() | {"architectures": None})).family.architecture
    ]
    config.save_pretrained(tmp_path)
    assert read_architecture(tmp_path).model == with_vocabulary(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipes_model_is_written_as_transformers_reads_it(family: str, tmp_path: Path) -> None:
    transformers = require("transformers", "make setup-dev")
    model = with_vocabulary(family)
    written = hf_config(model, "float32")
    folder_of(tmp_path, written)
    assert read_architecture(tmp_path).model == model
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    expected = transformers_config(family)
    assert type(theirs) is type(expected)
    ignored = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    assert {k: v for k, v in theirs.to_dict().items() if k not in ignored} == {
        k: v for k, v in expected.to_dict().items() if k not in ignored
    }


def test_a_model_of_no_family_cannot_be_written() -> None:
    model = replace(with_vocabulary("qwen3"), add_qkv_bias=True)
    with pytest.raises(UserError, match="no Hugging Face family"):
        hf_config(model, "float32")


@pytest.mark.parametrize(
    ("rope", "base", "expected"),
    [
        ({}, 1e4, RopeScalingConfig()),
        ({"rope_theta": 5e5}, 5e5, RopeScalingConfig()),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, RopeScalingConfig()),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, RopeScalingConfig()),
        (
            {"rope_theta": 9.0, "rope_scaling": {"type": "linear", "factor": 2}},
            9.0,
            RopeScalingConfig(RopeType.linear, 2.0),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
            5e5,
            RopeScalingConfig(RopeType.llama3, 32.0, 1.0, 4.0, 16),
        ),
    ],
)
def test_rotary_settings_of_old_and_new_config_files_are_read(
    rope: dict[str, Any], base: float, expected: RopeScalingConfig, tmp_path: Path
) -> None:
    model = read_architecture(folder_of(tmp_path, LLAMA | rope)).model
    assert (model.rotary_base, model.rope_scaling) == (base, expected)
    transformers = require("transformers", "make setup-dev")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert theirs["rope_theta"] == base


def test_both_names_of_the_number_of_experts_are_read(
    tmp_path: Path,
) -> None:
    assert read_architecture(folder_of(tmp_path, MOE)).model.num_moe_experts == 4
    renamed = {k: v for k, v in MOE.items() if k != "num_experts"} | {"num_local_experts": 8}
    assert read_architecture(folder_of(tmp_path, renamed)).model.num_moe_experts == 8


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma3"}, "gemma3.*not supported.*LlamaForCausalLM"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA | {"attention_bias": True}, "attention_bias=true"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias=true"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act=gelu"),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, "quantized weights"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "rotates 0.5"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),
        (LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "a rule per layer type"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "without a factor"),
        (LLAMA | {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        (MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "has no hidden_size; download"),
    ],
)
def test_unsupported_settings_are_refused_by_name(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        read_architecture(folder_of(tmp_path, config))
    assert "\n" not in str(error.value)


NUMBERS = ["rope_theta", "rms_norm_eps", "rope_scaling.factor", "rope_scaling.high_freq_factor"]
INTEGERS = [
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "decoder_sparse_step", "rope_scaling.original_max_position_embeddings",
]  # fmt: skip
NULLABLE = ["num_key_value_heads", "head_dim", "partial_rotary_factor", "attention_dropout"]
"""Numbers whose null transformers reads as its default."""
FLAGS = ["attention_bias", "mlp_bias", "tie_word_embeddings", "norm_topk_prob", "use_sliding_window"]
MAPPINGS = ["rope_scaling", "rope_parameters", "quantization_config"]
TEXTS = ["model_type", "hidden_act", "rope_scaling.rope_type"]
LISTS = ["architectures", "layer_types"]
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def with_field(field: str, value: Any) -> dict[str, Any]:
    """A file that is right but for one field."""
    config = MOE | {"rope_scaling": dict(LLAMA3)}
    section, _, name = field.rpartition(".")
    (config[section] if section else config)[name] = value
    return config


WRONG = [
    *((field, value) for field in NUMBERS for value in (None, "1.0", True, 0, -1.0, float("nan"), [1.0])),
    *((field, value) for field in NUMBERS for value in (float("inf"), 10**400)),
    *((field, value) for field in INTEGERS for value in (None, "2", True, 0, -2, 2.5, [2], {}, 10**400)),
    *((field, value) for field in NULLABLE for value in ("1", True, -1, [1], float("nan"))),
    *((field, value) for field in FLAGS for value in (None, "false", 0, 1, [], {})),
    *((field, value) for field in MAPPINGS for value in ("linear", 1.0, True, [], False, "")),
    *((field, value) for field in TEXTS for value in (None, 1, True, ["silu"])),
    *((field, value) for field in LISTS for value in ("LlamaForCausalLM", 1, [1], [None], {"a": 1})),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_field_of_another_type_is_one_sentence(field: str, value: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, with_field(field, value))
    with pytest.raises(UserError) as error:
        read_architecture(folder)
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    message = str(error.value)
    assert message.startswith(f"{folder / 'config.json'} has {field}={shown}, which is not ")
    assert message.endswith("; download it again, or correct the field")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, None) for field in NULLABLE + LISTS + MAPPINGS),
        ("sliding_window", None),
        ("dtype", None),
        ("mlp_only_layers", None),
        ("rope_scaling", {}),
        ("architectures", []),
        ("attention_dropout", 0),
    ],
)
def test_null_is_the_default_where_transformers_reads_it_so(field: str, value: Any, tmp_path: Path) -> None:
    missing = {name: content for name, content in MOE.items() if name != field}
    expected = read_architecture(folder_of(tmp_path / "missing", missing)).model
    assert read_architecture(folder_of(tmp_path / "null", MOE | {field: value})).model == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "cannot be read"),
        (b"", "cannot be read"),
        (b"[1, 2]", r"is not a JSON object but \[1, 2\]"),
        (b"null", "is not a JSON object but null"),
        (b'"llama"', "is not a JSON object but"),
        (b"version https://git-lfs.github.com/spec/v1", "cannot be read"),
        ('{"model_type": "llama"}'.encode("utf-16"), "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"model_type": "\xe9"}', "cannot be read"),
    ],
)
def test_a_file_that_is_no_json_object_is_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_architecture(tmp_path)
    assert str(error.value).endswith("; download it again") and "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    expected = read_architecture(folder_of(tmp_path, LLAMA))
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_architecture(tmp_path) == expected


def test_a_folder_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL, 4096),
        (MISTRAL | {"sliding_window": 32}, 32),
        (MISTRAL | {"sliding_window": None}, None),
        (LLAMA | {"sliding_window": 32}, None),
        (QWEN2 | {"sliding_window": 32}, None),
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, 32),
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, None),
        (
            QWEN2 | {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
            None,
        ),
        (MOE | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, 32),
    ],
)
def test_a_sliding_window_applies_where_the_family_uses_it(
    config: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    assert read_architecture(folder_of(tmp_path, config)).sliding_window == window


# ---------------------------------------------------------------------- policy.init_from


def load(tmp_path: Path, config: dict[str, Any], *overrides: str) -> Config:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {dir: unused}\nrollout: {max_response_tokens: 8}\n")
    folder = folder_of(tmp_path / "model", config)
    return load_config(recipe, [f"policy.init_from={folder}", *overrides])


def test_the_architecture_of_a_run_comes_from_the_folder(tmp_path: Path) -> None:
    config = load(tmp_path, MOE | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    expected = read_architecture(tmp_path / "model").model
    assert asdict(config.policy.model) == asdict(replace(expected, max_sequence_length=64))


def test_the_resolved_recipe_loads_again(tmp_path: Path) -> None:
    from opo_megatron.config import to_yaml

    config = load(tmp_path, QWEN2)
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_a_recipe_may_take_the_tokenizer_from_the_same_folder(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA, "task.tokenizer=${policy.init_from}")
    assert config.task.tokenizer == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.model.num_layers=3", r"policy\.model\.num_layers is 3.* has 2; remove"),
        ("policy.model.rope_scaling.factor=3", r"rope_scaling\.factor is 3\.0.* has 1\.0"),
        ("policy.model.max_sequence_length=65", "65.*64 positions"),
    ],
)
def test_a_recipe_that_contradicts_the_folder_is_refused(override: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        load(tmp_path, LLAMA, override)


def test_a_recipe_may_repeat_the_folder_and_shorten_its_sequences(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA, "policy.model.num_layers=2", "policy.model.max_sequence_length=40")
    assert config.policy.model.max_sequence_length == 40


def test_a_window_shorter_than_the_longest_sequence_is_refused(tmp_path: Path) -> None:
    config = MISTRAL | {"sliding_window": 40}
    with pytest.raises(UserError, match="last 40 tokens"):
        load(tmp_path, config)
    assert load(tmp_path, config, "policy.model.max_sequence_length=40")


# ---------------------------------------------------------------------- rotary frequencies


@pytest.mark.parametrize("family", ["llama", "llama, scaled, tied", "mistral, scaled", "qwen3"])
def test_rotary_frequencies_equal_transformers_bit_for_bit(family: str) -> None:
    rope = require("transformers.modeling_rope_utils", "make setup-dev")
    config = transformers_config(family)
    kind, model = config.rope_parameters["rope_type"], FAMILIES[family]
    if kind == "default":
        llama = require("transformers.models.llama.modeling_llama", "make setup-dev")
        expected, factor = llama.LlamaRotaryEmbedding.compute_default_rope_parameters(config, "cpu")
    else:
        expected, factor = rope.ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert factor == 1.0
    assert torch.equal(inverse_frequencies(model), expected)


def test_every_shape_of_every_family_is_positive() -> None:
    for model in FAMILIES.values():
        assert all(all(size > 0 for size in shape) for shape in hf_shapes(model, VOCAB_SIZE).values())
