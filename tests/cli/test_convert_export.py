"""`convert` and `export` as subprocesses, and runs that start and end with a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opo_megatron.tasks.lift import LiftTask
from opo_megatron.weights.random_init import random_weights
from tests.support.checkpoint_cli import CONVERT, EXPORT, RECIPE, command
from tests.support.hf_models import assert_same_tensors, save_random_model, tensors_of


def opo(recipe: Path, *overrides: str) -> str:
    return command("-m", "opo_megatron", "train", recipe, *overrides)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.slow
def test_convert_and_export_round_trip_with_verification(tmp_path: Path) -> None:
    save_random_model("qwen2, tied", tmp_path / "model", shard_size="20KB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    output = command(CONVERT, tmp_path / "model", tmp_path / "megatron", "--verify")
    assert "100 %" in output and "verified: log-probabilities differ by at most" in output
    output = command(
        EXPORT, tmp_path / "megatron", tmp_path / "back", "--max-shard-size", "0.00002", "--verify"
    )
    assert "verified" in output
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "convert_options", "export_options"),
    [
        ("llama, scaled, tied", ["--tensor-model-parallel-size=2"], ["--pipeline-model-parallel-size=2"]),
        ("qwen3_moe", ["--expert-model-parallel-size=2"], ["--tensor-model-parallel-size=2"]),
    ],
)
def test_convert_and_export_round_trip_on_several_ranks(
    family: str, convert_options: list[str], export_options: list[str], tmp_path: Path
) -> None:
    save_random_model(family, tmp_path / "model")
    assert "verified" in command(
        CONVERT, tmp_path / "model", tmp_path / "megatron", "--verify", *convert_options
    )
    assert "verified" in command(
        EXPORT, tmp_path / "megatron", tmp_path / "back", "--verify", *export_options
    )
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "model"))


@pytest.mark.slow
def test_a_run_starts_from_either_format_and_its_checkpoint_exports(recipe: Path, tmp_path: Path) -> None:
    save_random_model("qwen3, tied", tmp_path / "model")
    command(CONVERT, tmp_path / "model", tmp_path / "megatron")
    for name, start in (("a", tmp_path / "model"), ("b", tmp_path / "megatron")):
        output = opo(recipe, f"run.dir={tmp_path / name}", f"policy.init_from={start}")
        assert "starts from the weights of" in output
    for name in ("a", "b"):
        checkpoint = tmp_path / name / "checkpoints" / "step_00000001"
        assert "verified" in command(EXPORT, checkpoint, tmp_path / f"{name}-hf", "--verify")
    trained, other = tensors_of(tmp_path / "a-hf"), tensors_of(tmp_path / "b-hf")
    assert_same_tensors(other, trained)
    first = tensors_of(tmp_path / "model")
    assert first.keys() == trained.keys()
    assert any(not torch.equal(first[name], tensor) for name, tensor in trained.items())
    # The next run starts from the exported weights.
    opo(recipe, f"run.dir={tmp_path / 'c'}", f"policy.init_from={tmp_path / 'a-hf'}", "train.steps=0")
    # Without the folder of the initial weights, config.json is made from the recipe.
    (tmp_path / "megatron").rename(tmp_path / "gone")
    command(EXPORT, tmp_path / "b" / "checkpoints" / "step_00000001", tmp_path / "d", "--verify")
    assert_same_tensors(tensors_of(tmp_path / "d"), trained)


@pytest.mark.slow
def test_a_randomly_initialized_policy_exports_to_a_folder(recipe: Path, tmp_path: Path) -> None:
    opo(recipe, f"run.dir={tmp_path / 'run'}", "train.steps=0", "policy.dtype=bf16", "warm_start.lr=0")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert "verified" in command(EXPORT, checkpoint, tmp_path / "hf", "--verify")
    from opo_megatron.config import load_config

    model = load_config(tmp_path / "run" / "config.yaml").policy.model
    source = random_weights(model, LiftTask.vocab_size, seed=1)
    expected = {name: source(name).bfloat16() for name in tensors_of(tmp_path / "hf")}
    assert_same_tensors(tensors_of(tmp_path / "hf"), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CONVERT, "nowhere", "out"), "nowhere has no config.json"),
        ((EXPORT, "nowhere", "out"), "nowhere is not a checkpoint"),
        ((CONVERT, "nowhere"), "required: OUT"),
        ((EXPORT, "nowhere", "out", "--max-shard-size", "0"), "--max-shard-size is 0"),
        ((CONVERT, "nowhere", "out", "--dtype", "fp8"), "invalid choice: 'fp8'"),
        ((EXPORT, "nowhere", "out", "--quantize", "fp4"), "invalid choice: 'fp4'"),
        ((EXPORT, "nowhere", "out", "--scales", "fp32"), "--scales belongs to --quantize fp8_block"),
        ((EXPORT, "nowhere", "out", "--calibration-prompts", "3"), "belongs to --quantize fp8"),
        ((EXPORT, "nowhere", "out", "--quantize", "fp8", "--calibration-prompts", "0"), "must be at least 1"),
        ((EXPORT, "nowhere", "out", "--quantize", "fp8_block", "--verify"), "--verify expects equal"),
    ],
)
def test_wrong_arguments_give_one_error_line_and_code_2(arguments: tuple[object, ...], words: str) -> None:
    output = command(*arguments, code=2)
    assert words in output and output.startswith("error: ") and output.count("\n") == 1


def test_arguments_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_random_model("llama", folder)
    for arguments, words in (
        (["--tensor-model-parallel-size", 3], "not divisible by policy.tensor_model_parallel_size=3"),
        (["--expert-model-parallel-size", 2], "no experts"),
    ):
        output = command(CONVERT, folder, tmp_path / "out", *arguments, code=2)
        assert words in output and output.count("\n") == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert "choose another name" in command(CONVERT, folder, tmp_path / "out", code=2)


@pytest.mark.parametrize(("tool", "name"), [(CONVERT, "convert"), (EXPORT, "export")])
def test_the_tools_help_equals_the_subcommands(tool: Path, name: str) -> None:
    assert command(tool, "--help") == command("-m", "opo_megatron", name, "--help")
    assert f"  opo {name} " in command(tool, "--help")
