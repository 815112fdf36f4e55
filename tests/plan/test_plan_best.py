"""`opo plan --best`: what it searches, how it ranks, and that its proposals are recipes that train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.config.choices import Recompute
from opo_megatron.plan.best import (
    MARGIN,
    Layout,
    difference,
    engine_share,
    holds_more,
    layouts,
    own_layout,
    policies,
    predicted_seconds,
    rank_parameters,
    training_bytes,
)
from opo_megatron.plan.hardware import GPUS, constant
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.models import MODELS
from opo_megatron.plan.plan import Job, load_job
from opo_megatron.plan.show_best import recipe_difference
from opo_megatron.plan.sizes import sizes_of
from opo_megatron.plan.times import Work, communication_seconds
from tests.support.paths import ROOT

RECIPES = {
    "opo_r1_distill_qwen_7b": 8,
    "opo_qwen2.5_32b": 32,
    "opo_llama3_70b": 64,
    "opo_qwen3_30b_a3b": 32,
}
"""Recipe → GPUs."""


def path_of(recipe: str) -> str:
    return str(ROOT / "recipes" / f"{recipe}.yaml")


def job_of(recipe: str, gpus: int) -> Job:
    return load_job(path_of(recipe), [], gpus, GPUS["h100"], None)


@pytest.fixture(scope="module")
def job() -> Job:
    return job_of("opo_r1_distill_qwen_7b", 8)


def test_every_layout_of_the_search_uses_all_gpus_and_fits_by_formula(job: Job) -> None:
    found = list(layouts(job))
    assert len(found) == len(set(found)) > 100
    for layout in found:
        assert job.gpus % (layout.tensor * layout.pipeline * layout.context) == 0
        assert job.config.policy.model.num_layers % (layout.pipeline * (layout.virtual or 1)) == 0
        assert training_bytes(layout, job) <= (1 - MARGIN) * job.gpu.memory
        assert layout.share is not None and 0 < layout.share <= 0.95


def test_the_recipes_own_parallelism_is_among_the_layouts() -> None:
    for recipe, gpus in RECIPES.items():
        job = job_of(recipe, gpus)
        assert own_layout(job).parallelism in {layout.parallelism for layout in policies(job)}


def test_a_predicted_step_is_longer_with_recomputation_or_a_slower_engine(job: Job) -> None:
    base = Layout(1, 2, None, 1, 1, Recompute.none, 9216, 2, 0.7)
    plain = predicted_seconds(base, job)
    assert predicted_seconds(replace(base, recompute=Recompute.full), job) > plain
    assert predicted_seconds(replace(base, share=0.3), job) > plain


def test_parameters_of_a_rank_are_those_of_the_model_divided(job: Job) -> None:
    sizes = sizes_of(job.config.policy.model, job.vocab_size)
    whole = rank_parameters(Layout(1, 1, None, 1, 1, Recompute.none, 1, 1), job)
    assert whole == sizes.all_matrices
    divided = rank_parameters(Layout(2, 7, None, 1, 1, Recompute.none, 1, 1), job)
    assert divided == sizes.matrices // 2 // 7 + sizes.embedding // 2


def test_an_engines_share_leaves_the_margin_free(job: Job) -> None:
    layout = Layout(2, 1, None, 1, 1, Recompute.full, 9216, 1)
    share = engine_share(layout, 1, job)
    assert share is not None
    weights = 2 * rank_parameters(layout, job)
    free = job.gpu.memory - constant("reserved") - weights
    assert constant("reserved") + weights + share * free <= (1 - MARGIN) * job.gpu.memory


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recompute": Recompute.none}, True),
        ({"tokens": 18432}, True),
        ({"recompute": Recompute.full}, False),
        ({"tensor": 4}, False),
        ({"virtual": 2}, False),
        ({"engine_tensor": 8}, False),
    ],
)
def test_only_variants_that_surely_hold_more_are_left_out(changes: dict[str, Any], expected: bool) -> None:
    too_large = Layout(2, 2, None, 1, 1, Recompute.selective, 9216, 4)
    assert holds_more(replace(too_large, **changes), too_large) == expected


def test_exposed_communication_is_that_of_hand_arithmetic() -> None:
    lengths = Lengths(64, 0.0, 100.0, 1, 100)
    alone = Work(
        MODELS["Llama-3-70B"], 128256, 64, GPUS["h100"], lengths, 6400.0, 0.0, engine_tp=1, engine_weights=1,
        engine_token=1, running=1, engines=64,
    )  # fmt: skip
    assert communication_seconds(alone) == 0.0
    tokens, link = alone.trained_tokens, 0.8 * 450e9
    tensor = communication_seconds(replace(alone, tensor_parallel=8))
    # Of 80 layers, two all-reduces of 16 KB each way per token, in a forward and a backward pass.
    per_token = 80 * 2 * (2 * 7 / 8 * 2 * 8192) * 2
    assert tensor == pytest.approx(0.5 * per_token * tokens * 8 / 64 / link)
    context = communication_seconds(replace(alone, context_parallel=2))
    assert context == pytest.approx(0.5 * 80 * 2 * 2 * 8 * 128 * 2 * tokens / 64 / link)
    pipeline = communication_seconds(replace(alone, stages=4, chunks=5))
    assert pipeline == pytest.approx(0.5 * 2 * 5 * 2 * 8192 * tokens * 4 / 64 / (0.8 * 50e9))


def test_the_difference_is_a_recipe_with_the_proposed_layout(job: Job, tmp_path: Path) -> None:
    layout = Layout(1, 2, None, 4, 1, Recompute.none, 9216, 4, 0.73)
    text = recipe_difference(layout, job)
    assert "pipeline_model_parallel_size: 2  # 1" in text
    base = ROOT / "recipes" / "opo_r1_distill_qwen_7b.yaml"
    (tmp_path / "new.yaml").write_text(f"base: {base}\n{text}\n")
    assert len(yaml.safe_load(text)["policy"]) == len(
        [key for key in difference(layout, job) if key.startswith("policy.")]
    )
    changed = load_config(tmp_path / "new.yaml", [])
    again = replace(job, config=changed)
    assert replace(own_layout(again), share=0.73) == layout
    assert changed.rollout.sglang.options["mem_fraction_static"] == 0.73


def test_a_recipe_without_its_own_servers_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "recipes" / "quickstart.yaml"), "--best"]) == 2
    assert "rollout.engine=sglang, without rollout.sglang.urls" in capsys.readouterr().err


def best(recipe: str, gpus: int, *overrides: str) -> dict[str, Any]:
    """The search in a process of its own: the meta device is set per process."""
    command = [sys.executable, "-m", "opo_megatron", "plan", path_of(recipe)]
    command += [*overrides, "--gpus", str(gpus), "--best", "--json"]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_proposals_fit_and_come_fastest_first(gpus: int) -> None:
    report = best("quickstart_sglang", gpus, "policy.dtype=bf16")
    steps = [one["step"] for one in report["proposals"]]
    assert 0 < len(steps) <= report["at most"] and steps == sorted(steps)
    assert steps[0] <= report["recipe"]["step"] * 1.001
    for one in report["proposals"]:
        assert one["problem"] is None and one["peak"] <= (1 - MARGIN) * GPUS["h100"].memory


def scaled_down(layout: dict[str, Any], experts: bool) -> tuple[int, list[str]]:
    """A proposal with two ranks per dimension, on a model of four layers: (ranks, overrides)."""
    small = {
        key: min(2, layout[f"policy.{key}_model_parallel_size"]) for key in ("tensor", "pipeline", "expert")
    }
    context = min(2, layout["policy.context_parallel_size"])
    virtual = layout["policy.virtual_pipeline_model_parallel_size"]
    ranks = small["tensor"] * small["pipeline"] * context
    ranks *= small["expert"] if ranks < small["expert"] * small["pipeline"] else 1
    overrides = [f"policy.{key}_model_parallel_size={size}" for key, size in small.items()]
    overrides += [
        f"policy.context_parallel_size={context}",
        f"policy.virtual_pipeline_model_parallel_size={'null' if virtual is None else 2}",
        f"policy.sequence_parallel={str(small['tensor'] > 1).lower()}",
        f"policy.recompute={layout['policy.recompute']}",
        "policy.packing=thd",
        "policy.model.num_layers=4", "policy.model.hidden_size=32",
        "policy.model.ffn_hidden_size=64", "policy.model.num_attention_heads=4",
        "policy.model.num_query_groups=2", "rollout.prompts_per_step=8", "rollout.samples_per_prompt=2",
        "warm_start.steps=0", "train.steps=2", "eval.every_steps=0", "eval.problems=4", "observe.kl=off",
        "policy.max_tokens_per_micro_batch=128",
    ]  # fmt: skip
    if experts:
        overrides += [f"policy.model.{key}" for key in ("num_moe_experts=4", "moe_ffn_hidden_size=32")]
        overrides += ["policy.model.moe_router_topk=2"]
    return ranks, overrides


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("recipe", "gpus"), RECIPES.items())
def test_every_proposal_builds_and_its_scaled_down_form_trains(
    recipe: str, gpus: int, tmp_path: Path
) -> None:
    report = best(recipe, gpus)
    assert report["proposals"]
    job, seen = job_of(recipe, gpus), set()
    for number, one in enumerate(report["proposals"]):
        settings = one["layout"].items()
        overrides = [f"{key}={'null' if value is None else value}" for key, value in settings]
        load_job(path_of(recipe), overrides, gpus, GPUS["h100"], None)
        ranks, small = scaled_down(one["layout"], job.config.policy.model.num_moe_experts is not None)
        if tuple(small) in seen:
            continue
        seen.add(tuple(small))
        command = [sys.executable, "-m", "opo_megatron", "train", path_of("quickstart")]
        command += ["--nproc", str(ranks)]
        result = subprocess.run(
            [*command, f"run.dir={tmp_path / str(number)}", *small], capture_output=True, text=True,
            timeout=600, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        rows = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["step"] == 2


def test_known_models_have_the_elements_of_their_names() -> None:
    for name, billions in (("Llama-3-70B", 70.6), ("Qwen3-32B", 32.8), ("Qwen3-30B-A3B", 30.5)):
        model = MODELS[name]
        assert model.vocab_size is not None
        sizes = sizes_of(model, model.vocab_size)
        assert (sizes.all_matrices + sizes.vectors) / 1e9 == pytest.approx(billions, abs=0.06)
