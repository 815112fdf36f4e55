"""FP8 calibrated by nvidia-modelopt: scales against independent maxima, errors, no files left behind.

transformers does not read modelopt's format, and SGLang's linear layers for it need a GPU: the files are
checked against the format's definition, weight = fp8 · weight_scale and input_scale = max |input| / 448.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opo_megatron.cli import calibration
from opo_megatron.errors import UserError
from opo_megatron.tasks.lift import LiftTask
from tests.support.checkpoint_cli import CONVERT, EXPORT, RECIPE, command
from tests.support.hf_models import save_random_model, tensors_of
from tests.support.requirements import require

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [20, 0, 19, 7, 7, 7, 2]]


def largest_inputs(model: Any) -> dict[str, float]:
    """max |input| of every linear module over PROMPTS."""
    maxima: dict[str, float] = {}

    def hook_of(name: str) -> Any:
        def hook(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            maxima[name] = max(maxima.get(name, 0.0), float(arguments[0].abs().max()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook_of(name))
    with torch.no_grad():
        for prompt in PROMPTS:
            model(torch.tensor([prompt]))
    return maxima


def quantize(family: str, work: Path) -> tuple[Any, Path]:
    require("modelopt", "make setup-dev")
    from opo_megatron.weights.fp8_calibrated import quantize_calibrated

    model = save_random_model(family, work / "model")
    (work / "model" / "tokenizer.json").write_text("{}")
    (work / "fp8").mkdir()
    quantize_calibrated(work / "model", work / "fp8", PROMPTS, 2**30, print)
    return model, work / "fp8"


@pytest.mark.parametrize("family", ["qwen3", "qwen2, tied"])
def test_scales_are_from_maxima_and_weights_are_rounded_with_them(family: str, tmp_path: Path) -> None:
    model, folder = quantize(family, tmp_path)
    inputs, quantized, weights = largest_inputs(model), tensors_of(folder), tensors_of(tmp_path / "model")
    linear_layers = [name for name in inputs if name != "lm_head"]
    assert {n.removesuffix(".weight") for n, t in quantized.items() if t.dtype is torch.float8_e4m3fn} == set(
        linear_layers
    )
    for name in linear_layers:
        weight, scale = weights[f"{name}.weight"], quantized[f"{name}.weight_scale"]
        assert float(scale) == pytest.approx(float(weight.abs().max()) / 448, rel=1e-6)
        assert torch.equal(
            quantized[f"{name}.weight"].float(), (weight / scale).to(torch.float8_e4m3fn).float()
        )
        assert float(quantized[f"{name}.input_scale"]) == pytest.approx(inputs[name] / 448, rel=1e-5)
    unquantized = weights.keys() - {f"{name}.weight" for name in linear_layers}
    assert all(torch.equal(quantized[name], weights[name]) for name in unquantized)
    assert {p.name for p in folder.iterdir()} >= {"hf_quant_config.json", "config.json", "tokenizer.json"}
    quantization = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "FP8" and "lm_head" in quantization["exclude_modules"]
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
    )


def test_experts_are_quantized_one_by_one_and_the_router_is_not(tmp_path: Path) -> None:
    _, folder = quantize("qwen3_moe", tmp_path)
    quantized, weights = tensors_of(folder), tensors_of(tmp_path / "model")
    assert weights.keys() <= quantized.keys()
    for name, weight in weights.items():
        if ".experts." in name:
            assert quantized[name].dtype is torch.float8_e4m3fn
            scale = quantized[f"{name}_scale"]  # gate and up share one scale: engines fuse them
            error = (quantized[name].float() * scale - weight).abs()
            assert bool((error <= torch.maximum(2.0**-4 * weight.abs(), 2.0**-10 * scale) * (1 + 1e-6)).all())
            assert float(weight.abs().max()) / 448 <= float(scale) * (1 + 1e-6)
    router = "model.layers.1.mlp.gate.weight"
    assert torch.equal(quantized[router], weights[router])


def test_non_finite_weights_are_rejected(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from opo_megatron.weights.fp8_calibrated import quantize_calibrated

    require("modelopt", "make setup-dev")
    save_random_model("qwen3", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fp8").mkdir()
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        quantize_calibrated(tmp_path, tmp_path / "fp8", PROMPTS, 2**30, print)


@pytest.mark.slow
def test_the_command_calibrates_with_a_recipes_prompts(tmp_path: Path) -> None:
    require("modelopt", "make setup-dev")
    save_random_model("qwen3, tied", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command(CONVERT, tmp_path / "model", tmp_path / "megatron")
    arguments = [
        "--quantize",
        "fp8",
        "--calibrate-recipe",
        tmp_path / "recipe.yaml",
        "--calibration-prompts",
        8,
    ]
    output = command(EXPORT, tmp_path / "megatron", tmp_path / "fp8", *arguments)
    assert "calibrating with 8 prompts" in output and "8 of 8 prompts" in output
    assert "fp8 is complete" in output
    assert {path.name for path in tmp_path.iterdir()} == {"fp8", "megatron", "model", "recipe.yaml"}
    assert not (tmp_path / "fp8" / "unquantized").exists()
    assert any(t.dtype is torch.float8_e4m3fn for t in tensors_of(tmp_path / "fp8").values())
    output = command(EXPORT, tmp_path / "megatron", tmp_path / "more", "--quantize", "fp8", code=2)
    assert "this checkpoint belongs to no run; name a recipe" in output and output.count("\n") == 1
    assert not list(tmp_path.glob("more*"))


# ---------------------------------------------------------------------- prompts


def test_prompts_of_a_recipe_are_those_of_its_task(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    prompts = calibration.recipe_prompts(tmp_path / "recipe.yaml", [], 5)
    assert len(prompts) == 5 and all(
        0 <= token < LiftTask.vocab_size for prompt in prompts for token in prompt
    )


def test_texts_of_a_file_are_tokenized_by_the_models_tokenizer(tmp_path: Path) -> None:
    from tests.support.tokenizer_folder import make_tokenizer

    folder = Path(make_tokenizer(tmp_path / "tokenizer", eos_token="<eos>"))
    (tmp_path / "lines.txt").write_text("What is\n\nWhat is 3\n")
    rows = [{"text": "What is"}, {"question": "What is 3"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("lines.txt", "rows.jsonl"):
        prompts = calibration.file_prompts(tmp_path / name, [tmp_path, folder], 9)
        assert [len(prompt) for prompt in prompts] == [2, 3]
        assert len(calibration.file_prompts(tmp_path / name, [folder], 1)) == 1


def test_prompts_are_truncated_to_the_models_maximum_length() -> None:
    assert calibration.usable([[1, 2, 3], [], [4]], 5, 2) == [[1, 2], [4]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n", "line 1 of .* is not JSON"),
        ('{"a": 1}\n', "no text in the field text, prompt, question"),
        ("\n", "has no text; put"),
        (None, "cannot be read"),
        ('{"text": "a"}\n', "needs the model's tokenizer"),
    ],
)
def test_an_unusable_file_is_rejected(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        calibration.file_prompts(path, [tmp_path], 3)


def test_prompts_of_another_vocabulary_are_rejected() -> None:
    with pytest.raises(UserError, match=r"token 21, but the model's vocabulary has 21"):
        calibration.usable([[1, 21]], 21, 10)
    with pytest.raises(UserError, match="no prompt"):
        calibration.usable([[]], 21, 10)
