"""Block FP8 folders: every tensor by its definition, loading by transformers, errors in one sentence.

transformers loads them on a CPU by dequantizing.  What it loads on a GPU, without dequantizing, is compared
by name, shape and dtype with the modules that it would build.  A CPU server of SGLang needs AMX for these
weights, so what its `Fp8LinearMethod.create_fp8_weight_` allocates is checked from its source:
float8_e4m3fn [out, in], float32 `weight_scale_inv` [⌈out/128⌉, ⌈in/128⌉].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from opo_megatron.checkpoint.convert import convert, export
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.errors import UserError
from opo_megatron.kernels.fp8 import Scales, dequantize_blocks, quantize_blocks
from opo_megatron.weights.fp8_folder import BlockFp8
from tests.support.hf_models import (
    LLAMA,
    VOCAB_SIZE,
    WHOLE_BLOCKS,
    assert_same_tensors,
    log_probs_of,
    save_random_model,
    tensors_of,
    transformers_config,
)
from tests.support.requirements import require
from tests.support.round_trip import config_from

QWEN3, QWEN2, MOE = WHOLE_BLOCKS
SCALE = "_scale_inv"


@pytest.fixture(autouse=True)
def shut_down_groups() -> Iterator[None]:
    yield
    shutdown()


def quantized_folder(
    family: str,
    work: Path,
    scales: Scales = Scales.fp32,
    dtype: torch.dtype = torch.float32,
    **change: Tensor,
) -> tuple[dict[str, Tensor], Path]:
    """A random model's weights, and the FP8 folder exported from its checkpoint."""
    folder = work / "model"
    save_random_model(family, folder)
    weights = {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()} | change
    save_file(weights, folder / "model.safetensors")
    config = config_from(folder, work, 1)
    parallel = initialize(config)
    convert(folder, work / "megatron", config, parallel, None, print)
    blocks = BlockFp8(config.policy.model, scales)
    source, target = work / "megatron", work / "fp8"
    export(source, target, config, parallel, None, 2**17, [source], print, blocks)
    return weights, target


def is_quantized(name: str, tensor: Tensor) -> bool:
    """Independent definition: matrices of whole blocks in the layers, except the router."""
    whole = tensor.dim() == 2 and all(size % 128 == 0 for size in tensor.shape)
    return whole and ".layers." in name and ".mlp.gate." not in name


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WHOLE_BLOCKS)
def test_every_tensor_is_quantized_or_untouched(
    family: str, dtype: torch.dtype, scales: Scales, tmp_path: Path
) -> None:
    weights, folder = quantized_folder(family, tmp_path, scales, dtype)
    expected: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if is_quantized(name, tensor):
            expected[name], expected[name + SCALE] = quantize_blocks(name, tensor, scales)
        else:
            expected[name] = tensor
    exported = tensors_of(folder)
    as_bytes = lambda tensors: {n: t.view(torch.uint8) if t.dim() else t for n, t in tensors.items()}  # noqa: E731
    assert {n: t.dtype for n, t in exported.items()} == {n: t.dtype for n, t in expected.items()}
    assert_same_tensors(as_bytes(exported), as_bytes(expected))
    assert any(t.dtype is torch.float8_e4m3fn for t in exported.values())
    assert len(list(folder.glob("*.safetensors"))) > 1


def test_config_json_is_the_models_plus_the_quantization_config(tmp_path: Path) -> None:
    _, folder = quantized_folder(MOE, tmp_path, Scales.power_of_two)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((tmp_path / "model" / "config.json").read_text())
    routers = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *routers],
        "scale_fmt": "ue8m0",
    }


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("family", WHOLE_BLOCKS)
def test_transformers_loads_the_folder_on_a_cpu_by_dequantizing(
    family: str, scales: Scales, tmp_path: Path
) -> None:
    transformers = require("transformers", "make setup-dev")
    require("accelerate", "make setup-dev")
    weights, folder = quantized_folder(family, tmp_path, scales)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    dequantized = {
        name: dequantize_blocks(*quantize_blocks(name, tensor, scales))
        if is_quantized(name, tensor)
        else tensor
        for name, tensor in weights.items()
    }
    plain = tmp_path / "plain"
    transformers_config(family).save_pretrained(plain)
    save_file(dequantized, plain / "model.safetensors", metadata={"format": "pt"})
    loaded_dequantized = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for (name, actual), expected in zip(
        model.state_dict().items(), loaded_dequantized.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name
    assert log_probs_of(model.eval()) == log_probs_of(loaded_dequantized.eval())
    unquantized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    difference = torch.tensor(log_probs_of(model)) - torch.tensor(log_probs_of(unquantized.eval()))
    assert 1e-4 < float(difference.abs().mean()) < 0.5


@pytest.mark.parametrize("family", [QWEN3, QWEN2])
def test_the_folder_has_the_tensors_transformers_allocates_on_a_gpu(family: str, tmp_path: Path) -> None:
    """Without dequantizing: its FP8 modules on the meta device against the files."""
    transformers = require("transformers", "make setup-dev")
    fp8 = require("transformers.integrations.finegrained_fp8", "make setup-dev")
    _, folder = quantized_folder(family, tmp_path)
    raw = transformers.AutoConfig.from_pretrained(folder).quantization_config
    quantization = transformers.FineGrainedFP8Config(**raw)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(transformers_config(family))
    fp8.replace_with_fp8_linear(model, quantization.modules_to_not_convert, quantization, pre_quantized=True)
    allocated = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del allocated["lm_head.weight"]
    assert allocated == {name: (tuple(t.shape), t.dtype) for name, t in tensors_of(folder).items()}


def test_matrices_of_partial_blocks_are_not_quantized_but_counted() -> None:
    blocks = BlockFp8(replace(WHOLE_BLOCKS[QWEN2], vocab_size=VOCAB_SIZE), Scales.fp32)
    assert blocks.untouched == [
        "lm_head",
        *(f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")),
    ]
    assert blocks.notes == [
        "6 matrices keep their type because they are not made of whole 128×128 blocks, "
        "e.g. model.layers.0.mlp.gate_proj of shape [200, 256]"
    ]
    odd_experts = replace(WHOLE_BLOCKS[MOE], vocab_size=VOCAB_SIZE, moe_ffn_hidden_size=192)
    assert "model.layers.1.mlp.experts" in BlockFp8(odd_experts, Scales.fp32).untouched


def test_a_model_without_a_whole_block_is_rejected() -> None:
    with pytest.raises(UserError, match=r"whole 128×128 blocks .* is \[32, 32\].*--quantize fp8") as error:
        BlockFp8(replace(LLAMA, vocab_size=VOCAB_SIZE), Scales.fp32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_rejected_and_no_file_is_left(value: float, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(UserError, match=f"{name} holds NaN or infinite weights"):
        quantized_folder(QWEN3, tmp_path, **{name: torch.full((128, 384), value)})
    assert not list(tmp_path.glob("fp8*"))
