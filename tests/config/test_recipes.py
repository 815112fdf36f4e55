"""Multi-GPU recipes: architecture and layout as documented; scaled down, they train under torchrun."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.config.choices import Fp8
from opo_megatron.config.schema import Config
from opo_megatron.weights.param_mapping import Stages, parameters
from tests.support.paths import ROOT
from tests.support.scaled_down import RECIPES, SCALES, scale_down

PARAMETERS = {
    "opo_llama3_70b": 70_553_706_496,
    "opo_qwen2.5_32b": 32_763_876_352,
    "opo_qwen3_30b_a3b": 30_532_122_624,
    **dict.fromkeys((name for name in SCALES if "7b" in name or name.startswith("paper/")), 7_615_616_512),
}
"""As published on the models' pages."""


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPO_MODEL", "OPO_DATA", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def recipe(name: str, *overrides: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml", overrides, SCALES[name])


def name_of(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=name_of)
def test_every_recipe_passes_opo_config(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPO_TEST_DATA", "data")
    assert main(["config", str(path), "--nproc", str(SCALES.get(name_of(path), 1))]) == 0
    count = load_config(path, [], SCALES.get(name_of(path), 1)).algorithm.updates_per_batch
    updates = f"{count} optimizer steps" if count > 1 else "ONE optimizer step"
    assert updates in capsys.readouterr().out


@pytest.mark.parametrize("name", SCALES)
def test_the_architecture_has_the_models_number_of_parameters(name: str) -> None:
    policy = recipe(name).policy
    assert policy.model.vocab_size is not None
    stages = Stages(
        policy.model.num_layers,
        policy.pipeline_model_parallel_size,
        policy.virtual_pipeline_model_parallel_size or 1,
    )
    mapping = parameters(policy.model, policy.model.vocab_size, stages)
    assert sum(p.numel for p in mapping if not p.tied_duplicate) == PARAMETERS[name]
    numel_by_stage = [sum(p.numel for p in mapping if p.stage == stage) for stage in range(stages.pipeline)]
    assert math.isclose(max(numel_by_stage), min(numel_by_stage), rel_tol=0.15)  # stages are balanced


def test_the_70b_recipe_matches_its_header() -> None:
    config = recipe("opo_llama3_70b")
    policy = config.policy
    assert policy.model.kv_channels == 128 and policy.model.num_layers == 4 * 5 * 4
    assert policy.fp8 is Fp8.blockwise and config.rollout.sglang.fp8 is True
    assert SCALES["opo_llama3_70b"] // (8 * 4) == 2  # data parallel
    assert config.rollout.sglang.tensor_parallel_size == 8 and not config.rollout.sglang.urls


@pytest.mark.parametrize("name", SCALES)
def test_a_model_that_contradicts_its_recipe_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """OPO_MODEL may only name a model with the recipe's architecture."""
    from opo_megatron.config.architecture import hf_config

    model = recipe(name).policy.model
    model_config = hf_config(model, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(model_config))
    monkeypatch.setenv("OPO_MODEL", str(tmp_path))
    assert recipe(name).policy.model == model
    (tmp_path / "config.json").write_text(json.dumps(model_config | {"num_hidden_layers": 3}))
    assert main(["config", str(RECIPES / f"{name}.yaml")]) == 2
    assert "num_layers" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCALES)
def test_a_scaled_down_recipe_keeps_its_structure(name: str, tmp_path: Path) -> None:
    scaled = scale_down(name, tmp_path)
    small, big = load_config(RECIPES / f"{name}.yaml", scaled.overrides, scaled.ranks), recipe(name)
    for key in (
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "sequence_parallel",
        "recompute",
        "packing",
        "distributed_optimizer",
    ):
        assert getattr(small.policy, key) == getattr(big.policy, key), key
    assert (small.policy.tensor_model_parallel_size > 1) == (big.policy.tensor_model_parallel_size > 1)
    for key in ("add_qkv_bias", "rope_scaling", "rotary_base", "tie_embeddings", "qk_layernorm"):
        assert getattr(small.policy.model, key) == getattr(big.policy.model, key), key
    assert (small.algorithm, small.on_policy) == (big.algorithm, big.on_policy)
    assert scaled.ranks <= 8


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCALES)
def test_a_scaled_down_recipe_trains_two_steps_under_torchrun(name: str, tmp_path: Path) -> None:
    scaled = scale_down(name, tmp_path)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={scaled.ranks}",
    ]
    command += ["-m", "opo_megatron", "train", str(RECIPES / f"{name}.yaml"), *scaled.overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=800, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["on_policy/logprob_diff_max"] < 1e-4 for row in rows[1:])
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()
