"""Errors in recipes, overrides and command lines: one line, exit code 2, fast, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opo_megatron.distributed.launch import CHILD
from opo_megatron.distributed.outcome import ERROR_CLAIM, OUTCOME
from tests.support.cli_errors import refused, split
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "OPO_TEST_DATA", CHILD, ERROR_CLAIM, OUTCOME):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("run: {dir: out}")


MODEL = "policy.model."
TENSOR, PIPELINE = "policy.tensor_model_parallel_size", "policy.pipeline_model_parallel_size"
VIRTUAL, EXPERTS = "policy.virtual_pipeline_model_parallel_size", "policy.model.num_moe_experts"

OVERRIDE_ERRORS = [
    # keys
    (
        "rollout.prompt_per_step=1",
        "unknown key 'rollout.prompt_per_step'; did you mean 'rollout.prompts_per_step'?",
    ),
    ("lr=1", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
    ("optimiser={lr: 1}", "unknown key 'optimiser'; did you mean 'optimizer'?"),
    ("rollout={temprature: 1}", "unknown key 'rollout.temprature'; did you mean 'rollout.temperature'?"),
    ("zzz=1", "unknown key 'zzz'; `opo config RECIPE` prints every key"),
    ("train.steps", "override 'train.steps' is not key=value"),
    ("=3", "override '=3' is not key=value"),
    ("optimizer.betas=[0.9,", "override 'optimizer.betas=[0.9,' has a value that is not valid YAML"),
    # types
    ("train.steps=many", "train.steps is 'many'; it must be an integer"),
    ("train.steps=1.5", "train.steps is 1.5; it must be an integer"),
    ("train.steps=true", "train.steps is True; it must be an integer"),
    ("train.steps=null", "train.steps is None; it must be an integer"),
    ("optimizer.lr=true", "optimizer.lr is True; it must be a number"),
    ("optimizer.lr={a: 1}", "optimizer.lr is {'a': 1}; it must be a number"),
    ("optimizer.betas=0.9", "optimizer.betas is 0.9; it must be a list, each entry a number"),
    ("optimizer.betas=[a, b]", "optimizer.betas is ['a', 'b']"),
    ("observe.tensorboard=perhaps", "it must be true or false"),
    (
        "algorithm.baseline=ppo",
        "algorithm.baseline is 'ppo'; it must be one of opo, opo_loo, group_mean, rloo",
    ),
    ("algorithm.weight=None", "one of one, length, length_power, energy, energy_hidden, fitted or null"),
    ("rollout=3", "rollout is 3, but it is a section; set one of its keys, like rollout.engine"),
    ("policy.megatron=3", "policy.megatron is 3, but it is a section"),
    ("run.dir=???", "run.dir is not set; add run.dir=VALUE"),
    ("run.dir=${run.nothing}", "run.dir: "),
    ("run.dir=", "run.dir is ''; it must be the path of a folder"),
    # ranges
    ("optimizer.lr=nan", "optimizer.lr is nan; it must be a finite number"),
    ("optimizer.lr=-.inf", "optimizer.lr is -inf; it must be a finite number"),
    ("optimizer.betas=[0.9, .nan]", "optimizer.betas.1 is nan"),
    ("policy.megatron.init_method_std=.inf", "policy.megatron.init_method_std is inf"),
    ("rollout.temperature=0", "rollout.temperature is 0.0; it must be above 0"),
    ("eval.top_p=0", "eval.top_p is 0.0; it must be above 0 and at most 1"),
    ("rollout.top_p=1.5", "rollout.top_p is 1.5; it must be above 0 and at most 1"),
    ("optimizer.betas=[0.9, 1]", "optimizer.betas is [0.9, 1.0]; it must be two numbers"),
    ("warm_start.betas=[0.9]", "warm_start.betas is [0.9]; it must be two numbers"),
    ("warm_start.min_lr_ratio=2", "warm_start.min_lr_ratio is 2.0; it must be between 0 and 1"),
    ("optimizer.clip=-1", "optimizer.clip is -1.0; it must be 0 or more"),
    ("train.steps=-1", "train.steps is -1; it must be 0 or more"),
    ("rollout.prompts_per_step=0", "rollout.prompts_per_step is 0; it must be at least 1"),
    (MODEL + "num_attention_heads=0", "policy.model.num_attention_heads is 0; it must be at least 1"),
    (
        "task.name=chess",
        "task.name is 'chess'; it must be one of lift, text, reasoning_gym, or package.module:Class",
    ),
    ("resume=nowhere", "resume is 'nowhere'; it must be never, auto or the existing folder"),
    # sampling and algorithm
    (
        "rollout.top_p=0.9",
        "set it to 1, or accept off-policy rollouts with algorithm.off_policy_sampling=true",
    ),
    ("eval.top_p=0.9 observe.kl=eval", "eval.top_p is 0.9, which samples another distribution"),
    ("eval.top_k=3 observe.kl=eval", "set it to 0, or observe.kl=off"),
    ("observe.wandb_project= ", "observe.wandb_project is ' '; it must be the name of a project, or null"),
    ("rollout.samples_per_prompt=0", "rollout.samples_per_prompt is 0; it must be at least 1"),
    ("observe.kl=train", "observe.kl is 'train'; it must be one of off, eval"),
    ("task.name=text", "task.name is text, but task.data is null; name a JSONL or Parquet file"),
    ("task.name=reasoning_gym", "task.generator is null; name a generator"),
    ("run.dir=${oc.env:OPO_TEST_DATA}/x", "the environment variable OPO_TEST_DATA is not set; export"),
    ("rollout.top_k=5", "rollout.top_k is 5, which samples another distribution than the policy"),
    ("rollout.max_response_tokens=2048", "policy.model.max_sequence_length=2048; lower the first"),
    ("algorithm.updates_per_batch=2", "OPO takes exactly one optimizer step per batch"),
    ("algorithm.kl_coefficient=0.1", "algorithm.kl_coefficient is 0.1, but OPO has no KL term"),
    ("algorithm.objective=clipped algorithm.updates_per_batch=5", "not divisible by algorithm.updates_per"),
    ("algorithm.objective=clipped on_policy.action=correct", "set on_policy.action to refuse or warn"),
    ("algorithm.objective=ppo", "it must be one of policy_gradient, clipped"),
    ("algorithm.clip_low=1", "algorithm.clip_low is 1.0; it must be above 0 and below 1"),
    ("algorithm.clip_high=0", "algorithm.clip_high is 0.0; it must be above 0"),
    ("algorithm.baseline=auto algorithm.variance_every=0", "algorithm.baseline=auto fits its weights to"),
    ("algorithm.variance_prompts=1", "algorithm.variance_prompts is 1; it must be at least 2"),
    ("algorithm.variance_of=one", "it must be one of output_layer, all_parameters"),
    ("rollout.samples_per_prompt=1", "where each response is its own baseline and every advantage is 0"),
    ("algorithm.loss_constant=5", "used only with algorithm.loss_normalizer=constant"),
    # engines
    (
        "rollout.routing_replay=true",
        "rollout.routing_replay is true, but the model has no experts; remove it",
    ),
    ("rollout.sglang.transport=pigeon", "it must be one of tensor, distributed, disk"),
    ("rollout.sglang.timeout_seconds=0", "rollout.sglang.timeout_seconds is 0.0; it must be above 0"),
    ("on_policy.max_importance_weight=-1", "on_policy.max_importance_weight is -1.0; it must be above 0"),
    # model and layout
    (
        MODEL + "num_attention_heads=3",
        "policy.model.hidden_size 128 is not divisible by num_attention_heads 3",
    ),
    (MODEL + "num_query_groups=3", "policy.model.num_attention_heads is 4, which is not divisible by"),
    (MODEL + "kv_channels=33", "policy.model.kv_channels is 33; it must be even"),
    (f"{MODEL}hidden_size=129 {MODEL}kv_channels=32", "policy.model.hidden_size is 129; it must be even"),
    (f"{TENSOR}=8", "policy.model.num_attention_heads is 4, which is not divisible by " + TENSOR),
    (f"{TENSOR}=4 {MODEL}num_query_groups=2", "policy.model.num_query_groups is 2, which is not divisible"),
    (f"{TENSOR}=4 {MODEL}ffn_hidden_size=354", "policy.model.ffn_hidden_size is 354, which is not divisible"),
    (f"{PIPELINE}=4", f"policy.model.num_layers is 2, which is not divisible by {PIPELINE}=4"),
    (
        f"{PIPELINE}=2 {VIRTUAL}=2",
        "is not divisible by policy.pipeline_model_parallel_size × virtual stages=4",
    ),
    (f"{VIRTUAL}=2", "there is one pipeline stage"),
    (f"{PIPELINE}=2 {VIRTUAL}=1", f"{VIRTUAL} is 1; it must be at least 2, or null"),
    ("policy.sequence_parallel=true", "needs policy.tensor_model_parallel_size above 1"),
    # experts
    (
        f"{EXPERTS}=4 policy.expert_model_parallel_size=3",
        "policy.model.num_moe_experts is 4, which is not divisible",
    ),
    ("policy.expert_model_parallel_size=2", "but the model has no experts"),
    ("policy.expert_tensor_parallel_size=2", "but the model has no experts"),
    (f"{MODEL}moe_ffn_hidden_size=64", "but the model has no experts"),
    (f"{EXPERTS}=4 {MODEL}moe_router_topk=5", "more than policy.model.num_moe_experts=4"),
    (f"{EXPERTS}=4 {TENSOR}=2", "set policy.sequence_parallel=true"),
    (
        f"{EXPERTS}=4 policy.expert_tensor_parallel_size=3",
        "policy.model.moe_ffn_hidden_size is 352, which is not",
    ),
    (
        f"{EXPERTS}=4 {TENSOR}=2 policy.sequence_parallel=true policy.expert_tensor_parallel_size=1",
        "Megatron then sums expert gradients over too few ranks; set both to the same",
    ),
    # Megatron's own fields
    (
        "policy.megatron.moe_router_score_function=sigmoid",
        "could change what the policy computes without the engine knowing",
    ),
    (
        f"{MODEL}num_layers=4 {PIPELINE}=2 {VIRTUAL}=2 policy.megatron.batch_p2p_comm=true",
        "silently gives wrong gradients in Megatron, because both neighbours are one rank; set it to false",
    ),
    (
        f"{MODEL}num_layers=8 {PIPELINE}=4 {VIRTUAL}=2 policy.megatron.batch_p2p_comm=true",
        "excludes overlap_p2p_comm",
    ),
    ("policy.megatron.recompute_granularty=full", "did you mean 'policy.megatron.recompute_granularity'?"),
    ("policy.megatron.rotary_base=1", "did you mean 'policy.model.rotary_base'?"),
    ("policy.megatron.num_layers=3", "is set by the project; set policy.model.num_layers instead"),
    ("policy.megatron.bf16=true", "set policy.dtype instead"),
    ("policy.megatron={attention_dropout: 0.1}", "dropout must be 0: the engine samples without it"),
    ("policy.megatron.fp8=hybrid", "set policy.fp8 instead"),
    (
        "policy.megatron.moe_aux_loss_coeff=0.01",
        "the gradient is of the policy objective and nothing else, an auxiliary loss would add its own",
    ),
    ("policy.megatron.moe_aux_loss_coeff=[0.01]", "an auxiliary loss would add its own"),
    ("policy.megatron.moe_z_loss_coeff=0.001", "an auxiliary loss would add its own"),
    (
        "policy.megatron.moe_router_load_balancing_type=aux_loss",
        "the gradient is of the policy objective and nothing else, and balancing would change it",
    ),
    ("policy.megatron.moe_router_load_balancing_type=sinkhorn", "and balancing would change it"),
    ("policy.megatron.moe_router_enable_expert_bias=true", "without the engine knowing"),
    ("policy.megatron.moe_expert_capacity_factor=1.0", "without the engine knowing"),
    ("policy.megatron.moe_router_fusion=true", "ignores the experts of rollout.routing_replay, remove it"),
    ("policy.megatron.moe_enable_routing_replay=true", "set rollout.routing_replay instead"),
    (
        "rollout.routing_replay=true",
        "rollout.routing_replay is true, but the model has no experts; remove it",
    ),
]


@pytest.mark.parametrize(("overrides", "words"), OVERRIDE_ERRORS, ids=[pair[0] for pair in OVERRIDE_ERRORS])
def test_a_wrong_override_gives_one_line_with_key_value_and_remedy(capsys, overrides, words):
    assert words in refused(capsys, "config", "recipe.yaml", *split(overrides))


FILE_ERRORS = [
    (
        "run: {dir: x}\noptimizer: {lrr: 1}",
        "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'? (in r.yaml)",
    ),
    ("run: {dir: x}\ntrain: {steps: x}", "train.steps is 'x'; it must be an integer (in r.yaml)"),
    ("optimizer: {lr: 1}", "run.dir is not set; add run.dir="),
    ("run:\n  dir: x\n seed: 1\n", "recipe 'r.yaml' is not valid YAML, line 3"),
    ("run: {dir: x}\nrun: {dir: y}", "recipe 'r.yaml' is not valid YAML, line 2: found duplicate key run"),
    ("- run\n- dir\n", "recipe 'r.yaml' is a list, not a mapping"),
    ("17", "recipe 'r.yaml' is not a mapping"),
    ("base: [a.yaml]", "base is ['a.yaml'] in r.yaml; it must be the path of one recipe"),
    ("base: gone.yaml", "recipe 'gone.yaml', the base of 'r.yaml', does not exist; check the path"),
    ("base: r.yaml", "base: r.yaml → r.yaml is a cycle"),
    ("run: {dir: '${'}", "interpolation that cannot be read"),
    ("run: 1\n", "run is 1, but it is a section; set one of its keys, like run.dir (in r.yaml)"),
]


@pytest.mark.parametrize(("text", "words"), FILE_ERRORS)
def test_a_wrong_recipe_gives_one_line_that_names_the_file(capsys, text, words):
    Path("r.yaml").write_text(text)
    assert words in refused(capsys, "config", "r.yaml")


def test_a_cycle_of_bases_over_folders_names_the_whole_chain(capsys):
    Path("sub").mkdir()
    Path("a.yaml").write_text("base: sub/b.yaml")
    Path("sub/b.yaml").write_text("base: ../a.yaml")
    assert "a.yaml → sub/b.yaml → sub/../a.yaml is a cycle" in refused(capsys, "config", "a.yaml")


def test_unreadable_recipes_are_named(capsys, tmp_path):
    assert "recipe 'gone.yaml' does not exist" in refused(capsys, "config", "gone.yaml")
    assert "the recipe comes before key=value" in refused(capsys, "config", "train.steps=3")
    assert "Is a directory" in refused(capsys, "config", str(tmp_path))
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refused(capsys, "config", "binary.yaml")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: RECIPE"),
        (["train", "recipe.yaml", "--gpus", "2"], "unrecognized arguments: --gpus"),
        (["train", "recipe.yaml", "--np", "2"], "unrecognized arguments: --np"),
        (["train", "recipe.yaml", "--nproc", "two"], "'two' is not a number of ranks"),
        (["train", "recipe.yaml", "--nproc", "0"], "'0' is not a number of ranks"),
    ],
)
def test_a_wrong_command_line_points_to_help(capsys, argv, words):
    line = refused(capsys, *argv)
    assert words in line and "--help` shows examples" in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("recipe.yaml rollout.prompt_per_step=3", "unknown key 'rollout.prompt_per_step'; did you mean"),
        ("recipe.yaml train.steps=many", "train.steps is 'many'; it must be an integer"),
        (f"recipe.yaml {PIPELINE}=4", "policy.model.num_layers is 2, which is not divisible by"),
        ("recipe.yaml algorithm.updates_per_batch=2", "exactly one optimizer step per batch"),
        ("recipe.yaml rollout.top_p=0.9", "samples another distribution than the policy"),
        ("recipe.yaml task.name=text task.data=x.jsonl warm_start.steps=3", "has no demonstrations"),
        ("recipe.yaml run.dir=notes", "run.dir=notes is not empty; choose another run.dir"),
        ("gone.yaml", "recipe 'gone.yaml' does not exist"),
        (f"recipe.yaml --nproc 3 {TENSOR}=2", "start a multiple of 2 ranks (--nproc 2)"),
    ],
)
def test_an_error_in_the_recipe_is_reported_in_under_3_seconds(argv, words):
    Path("notes").mkdir()
    Path("notes/notes.txt").touch()
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "opo_megatron", "train", *argv.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - start < 3
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("error: ") and words in result.stderr
