"""`opo plan`: totals independent of the layout, bytes from hand arithmetic, errors for wrong arguments.

The meta device is set per process, so whatever builds a policy runs in a child process.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opo_megatron.batch.micro_batch import padded_length, schedule_for, sequence_alignment
from opo_megatron.cli.main import main
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.plan.activations import LiveBytes
from opo_megatron.plan.engine import EnginePlan
from opo_megatron.plan.hardware import CONSTANTS, GPUS
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.models import MODELS
from opo_megatron.plan.plan import (
    Phases,
    _micro_batches,
    counted_config,
    load_job,
    longest_samples,
    problem_of,
)
from opo_megatron.plan.ranks import RankBytes, offloaded
from opo_megatron.plan.times import (
    Work,
    active_parameters,
    dispatch_seconds,
    experts_read,
    generation_seconds,
    host_step_seconds,
)
from opo_megatron.weights.param_mapping import hf_shapes
from tests.support.paths import ROOT, WORKERS

RECIPE = ROOT / "recipes" / "quickstart.yaml"
WORKER = WORKERS / "plan_worker.py"
LLAMA_70B = (
    "num_layers=80",
    "hidden_size=8192",
    "ffn_hidden_size=28672",
    "num_attention_heads=64",
    "num_query_groups=8",
    "vocab_size=128256",
)
SMALL = ("num_layers=4", "hidden_size=64", "ffn_hidden_size=96", "num_query_groups=2", "vocab_size=101")
TENSOR = "tensor_model_parallel_size"
PIPELINE = "pipeline_model_parallel_size"
INTERLEAVED = f"{PIPELINE}=2,virtual_{PIPELINE}=2,dtype=bf16,distributed_optimizer=true"


def count(gpus: int, needs: str, model: tuple[str, ...], *layouts: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", str(WORKER), str(RECIPE), str(gpus), needs]
    command += [f"policy.model.{key}" for key in model]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *layouts], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr
    report: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def small() -> list[dict[str, Any]]:
    return count(
        4,
        "streams",
        SMALL,
        f"{TENSOR}=2,sequence_parallel=true,{PIPELINE}=2",
        INTERLEAVED,
        f"{INTERLEAVED},max_tokens_per_micro_batch=128",
        f"{INTERLEAVED},max_tokens_per_micro_batch=128,packing=thd",
        f"{INTERLEAVED},max_tokens_per_micro_batch=128,packing=thd,context_parallel_size=2",
    )


def small_model() -> dict[str, tuple[int, ...]]:
    model = ModelConfig(4, 64, 96, 4, 2, 16, vocab_size=101)
    return hf_shapes(model, 101)


def elements(*parts: str) -> int:
    """Elements of all tensors whose names contain one of these parts."""
    shapes = small_model().items()
    return sum(math.prod(shape) for name, shape in shapes if any(part in name for part in parts))


def test_parameters_over_ranks_sum_to_the_model_under_every_layout(small: list[dict[str, Any]]) -> None:
    expected = sum(math.prod(shape) for shape in small_model().values())
    for report in small:
        assert sum(rank["own_parameters"] for rank in report["ranks"]) == expected


def test_bytes_per_rank_are_those_of_hand_arithmetic(small: list[dict[str, Any]]) -> None:
    tp_pp, interleaved = small[:2]
    layers = elements(".layers.") // 2  # two stages
    norms = elements("layernorm") // 2
    rows = -(-101 // 2)  # per tensor-parallel rank, one of them padding
    sharded = (layers - norms) // 2 + norms + rows * 64
    for rank in tp_pp["ranks"]:
        last = 64 if rank["pp_rank"] == 1 else 0
        # fp32: no separate master weights; Megatron pads its buckets to 128 elements.
        padded = -(-(sharded + last) // 128) * 128
        assert rank["parameters"] == rank["gradients"] == 4 * padded
        assert rank["optimizer"] == 2 * 4 * (sharded + last)
    for rank in interleaved["ranks"]:
        whole = layers + 101 * 64 + (64 if rank["pp_rank"] == 1 else 0)
        # bf16, one buffer per chunk; fp32 gradients; master weights and two moments over two replicas.
        assert rank["parameters"] >= 2 * whole and rank["parameters"] < 2 * (whole + 2 * 256)
        assert rank["gradients"] == 2 * rank["parameters"]
        assert abs(rank["optimizer"] - 12 * whole // 2) <= 12 * 2 * 128


def test_every_rank_receives_every_tensor_once(small: list[dict[str, Any]]) -> None:
    for report, itemsize in zip(small, (4, 2, 2, 2, 2), strict=True):
        assert report["tensors"] == len(small_model())
        assert report["bytes"] == itemsize * sum(math.prod(shape) for shape in small_model().values())


def test_sync_bytes_are_split_by_the_link_between_ranks(small: list[dict[str, Any]]) -> None:
    """Two ranks per node: tensor-parallel ranks share a node, pipeline ranks do not."""
    matrices = elements(".layers.") - elements("layernorm")
    for rank, (nvlink, network) in enumerate(small[0]["received"]):
        vocabulary = 2 * 51 * 64  # padded, on both stages
        norms = 2 * (elements("layernorm") // 2)  # each of two ranks sends its copy
        own = matrices // 2 + vocabulary + norms + (2 * 64 if rank >= 2 else 0)
        other = matrices // 2 + vocabulary + norms + (2 * 64 if rank < 2 else 0)
        assert nvlink == 4 * own // 2
        assert network == 4 * other


def test_a_stage_with_more_micro_batches_in_flight_holds_more(small: list[dict[str, Any]]) -> None:
    """Interleaved: the first of two stages warms up with two more chunks than the last."""
    by_stage = {rank["pp_rank"]: rank["activations"] for rank in small[1]["ranks"]}
    assert by_stage[0] > by_stage[1]


def test_packed_and_padded_micro_batches_of_equal_tokens_hold_the_same(small: list[dict[str, Any]]) -> None:
    """Two micro-batches of four samples per rank, as four rows or as one."""
    padded, packed = ([rank["activations"] for rank in report["ranks"]] for report in small[2:4])
    assert packed == pytest.approx(padded, rel=0.02)


def test_a_context_parallel_rank_holds_its_share_of_each_micro_batch(small: list[dict[str, Any]]) -> None:
    """And of the optimizer state, like a data-parallel rank; the gradient of one weight is not split."""
    whole, half = ([rank["activations"] for rank in report["ranks"]] for report in small[3:])
    largest = 2 * (2 * 96 * 64)  # gate and up projection, bf16
    for full, sharded in zip(whole, half, strict=True):
        assert -1024 < sharded - full / 2 < largest + 1024
    for data, context in zip(small[3]["ranks"], small[4]["ranks"], strict=True):
        assert context["optimizer"] == data["optimizer"] and context["gradients"] == data["gradients"]


@pytest.mark.parametrize("packing", ["padded", "thd"])
def test_padding_equals_that_of_the_schedule_of_a_run(packing: str) -> None:
    interleaved = [f"policy.{PIPELINE}=2", f"policy.virtual_{PIPELINE}=2", "policy.model.num_layers=4"]
    job = load_job(str(RECIPE), [*interleaved, f"policy.packing={packing}"], 4, GPUS["h100"], 8)
    count, padded_tokens, padding = _micro_batches(job)
    lengths = [round(job.lengths.prompt) + response for response in job.lengths.responses()]
    schedule = schedule_for(job.config.policy, lengths, 2)
    assert count == schedule.count and count % 2 == 0 and schedule.shape is not None
    assert padded_tokens == 2 * count * math.prod(schedule.shape)
    assert padding == pytest.approx(1 - (sum(lengths) - len(lengths)) / padded_tokens)
    assert padding < 0.01 if packing == "thd" else padding > 0.3


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("budget", [20, 100, 2500])
def test_the_longest_packed_samples_fill_their_micro_batches(budget: int, context: int) -> None:
    overrides = ["policy.packing=thd", f"policy.max_tokens_per_micro_batch={budget}"]
    overrides += [f"policy.context_parallel_size={context}"]
    job = load_job(str(RECIPE), overrides, 2 * context, GPUS["h100"], None)
    samples = longest_samples(job)
    schedule = schedule_for(job.config.policy, [sum(one) for one in samples], 2)
    padded_tokens = schedule.padded_tokens([sum(one) for one in samples])
    assert min(response for _, response in samples) > 0 < min(prompt for prompt, _ in samples)
    longest = job.lengths.longest_prompt + job.lengths.longest_response
    assert (
        padded_tokens
        == [schedule.count * max(budget, padded_length(longest, sequence_alignment(job.config.policy)))] * 2
    )


def test_the_offloaded_fraction_of_the_optimizer_is_host_memory() -> None:
    rank = RankBytes(0, 0, 0, 0, 0, parameters=20, gradients=40, optimizer=120, own_parameters=10)
    assert offloaded(rank, 0.0) == rank
    half = offloaded(rank, 0.5)
    assert (half.static, half.optimizer, half.host_optimizer) == (120, 60, 60)
    assert offloaded(rank, 1.0).static == 60
    billion = host_step_seconds(12 * 10**9)
    # 8 GB over PCIe at 50 GB/s, 28 GB read and written at 76.75 GB/s of memory bandwidth.
    assert billion == pytest.approx(8 / 50 + 28 / 76.75)
    job = load_job(str(RECIPE), ["policy.dtype=bf16", "policy.optimizer_offload=0.5"], 2, GPUS["h100"], None)
    assert counted_config(job).policy.optimizer_offload == 0 != job.config.policy.optimizer_offload


def test_live_bytes_count_storages_until_they_are_freed() -> None:
    with LiveBytes() as live:
        base = torch.empty(1000, device="meta")
        view, other = base.view(10, 100), base + 1
        assert live.held == 8000
        del other
        base.add_(1)
        assert live.held == 4000 and live.peak == 8000
        del base
        assert live.held == 4000 and view.numel() == 1000
        del view
    assert live.held == 0 and live.peak == 8000


def test_llama_3_70b_has_the_same_parameters_under_two_layouts() -> None:
    tall, wide = count(
        32,
        "bytes",
        (*LLAMA_70B, "max_sequence_length=8192"),
        f"dtype=bf16,{TENSOR}=8,sequence_parallel=true,{PIPELINE}=4",
        f"dtype=bf16,{TENSOR}=4,sequence_parallel=true,{PIPELINE}=8,virtual_{PIPELINE}=5",
    )
    for report in (tall, wide):
        assert sum(rank["own_parameters"] for rank in report["ranks"]) == 70_553_706_496
    assert tall["ranks"][0]["parameters"] != wide["ranks"][0]["parameters"]


@pytest.mark.slow
def test_experts_are_counted_once_over_expert_parallel_ranks() -> None:
    experts = ("num_moe_experts=8", "moe_ffn_hidden_size=48")
    (report,) = count(4, "bytes", (*SMALL, *experts), "expert_model_parallel_size=2")
    model = ModelConfig(4, 64, 96, 4, 2, 16, vocab_size=101, num_moe_experts=8, moe_ffn_hidden_size=48)
    expected = sum(math.prod(shape) for shape in hf_shapes(model, 101).values())
    assert sum(rank["own_parameters"] for rank in report["ranks"]) == expected


def test_model_configs_reproduce_the_published_parameter_counts() -> None:
    """Sizes as stated in the model cards."""
    sizes = {"Llama-3.1-8B": 8_030_261_248, "Qwen3-32B": 32_762_123_264, "Llama-3-70B": 70_553_706_496}
    sizes |= {"Qwen3-30B-A3B": 30_532_122_624, "Qwen3-235B-A22B": 235_093_634_560}
    for name, size in sizes.items():
        model = MODELS[name]
        assert model.vocab_size is not None
        assert sum(math.prod(shape) for shape in hf_shapes(model, model.vocab_size).values()) == size
        assert active_parameters(model, model.vocab_size) < size - model.vocab_size * model.hidden_size


def expert_work(**changes: Any) -> Work:
    model = MODELS["Qwen3-30B-A3B"]
    assert model.vocab_size is not None
    work = Work(
        model, model.vocab_size, 32, GPUS["h100"], Lengths(64, 0.0, 100.0, 1, 100), 3200.0, 0.0, engine_tp=1,
        engine_weights=1000, engine_token=0, running=2, engines=32, expert_parallel=8,
    )  # fmt: skip
    return replace(work, **changes)


def test_the_share_of_experts_that_is_read_is_that_of_independent_choices() -> None:
    model = ModelConfig(num_moe_experts=6, moe_router_topk=2)
    sets = list(itertools.combinations(range(6), 2))
    for rows in (1, 2, 3):
        choices = list(itertools.product(sets, repeat=rows))
        mean = sum(len({e for one in chosen for e in one}) for chosen in choices) / len(choices)
        assert experts_read(model, rows) == pytest.approx(mean / 6, rel=1e-12)
    assert experts_read(ModelConfig(), 1) == 1.0


def test_the_dispatch_of_tokens_to_experts_is_hand_arithmetic() -> None:
    """100 tokens per GPU, 48 layers, 8 experts: 2,048 numbers of 2 bytes there and back, 7 of 8 to others."""
    once = 100 * 48 * 8 * 2048 * 2 * 2 * 7 / 8
    link = CONSTANTS["link_efficiency"].value
    nvlink, network = CONSTANTS["nvlink"].value * link, CONSTANTS["network"].value * link
    assert dispatch_seconds(expert_work()) == pytest.approx(2 * once / nvlink)
    assert dispatch_seconds(expert_work(recomputes=True, passes=2.0)) == pytest.approx(5 * once / nvlink)
    assert dispatch_seconds(expert_work(tensor_parallel=2)) == pytest.approx(2 * once / network)
    assert dispatch_seconds(expert_work(expert_parallel=1)) == 0.0


def test_a_decoding_step_reads_only_the_experts_that_are_chosen() -> None:
    """100 steps, in which 2 of 2 responses that all have 100 tokens read the dense part and their experts."""
    gpu = replace(GPUS["h100"], bf16=1e30)
    lengths = Lengths(64, 0.0, 100.0, 0, 100)
    work = expert_work(gpu=gpu, lengths=lengths, engine_experts=900)
    bandwidth = gpu.bandwidth * CONSTANTS["memory_efficiency"].value
    read = 100 + 900 * (1 - (1 - 8 / 128) ** 2)
    seconds = generation_seconds(work) - 100 * CONSTANTS["decode_step"].value
    assert seconds == pytest.approx(100 * read / bandwidth, rel=1e-6)


def test_response_lengths_have_the_requested_mean() -> None:
    for mean in (10.0, 300.0, 900.0, 1000.0):
        lengths = Lengths(5000, 20, mean, 20, 1000)
        sampled = lengths.responses()
        assert sum(sampled) / len(sampled) == pytest.approx(mean, rel=5e-3)
        assert max(sampled) <= 1000


def test_every_constant_has_a_source() -> None:
    assert all(constant.source and constant.value > 0 for constant in CONSTANTS.values())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpus", "6", f"policy.{TENSOR}=4"], ("--gpus 6", "the nearest multiple is --gpus 8")),
        (["--gpu", "a100"], ("--gpu a100", "h100, h200")),
        (["policy.init_from=Llama-3.1-71B"], ("policy.init_from=Llama-3.1-71B", "Llama-3.1-70B")),
        (["--mean-response", "90"], ("--mean-response 90", "rollout.max_response_tokens=24")),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(RECIPE), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts)


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--mean-response" in text and "opo plan my.yaml --gpus 64" in text


def plan(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "opo_megatron",
        "plan",
        str(recipe),
        "--json",
        *arguments,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


TOO_LARGE = """
run: {dir: unused}
policy:
  init_from: Llama-3.1-8B
  dtype: bf16
  distributed_optimizer: false
  max_tokens_per_micro_batch: 4096
  model: {max_sequence_length: 4096}
rollout: {engine: sglang, max_response_tokens: 2048}
"""
"""Each of 4 GPUs holds all of Llama 3.1 8B and of Adam's state: 144 GB."""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("policy.model.num_layers=3", "but the model in policy.init_from=Llama-3.1-8B has 32; remove"),
        ("policy.model.rotary_base=1", "but the model in policy.init_from=Llama-3.1-8B has 500000.0; remove"),
        ("policy.model.max_sequence_length=999999", "the model in policy.init_from=Llama-3.1-8B has 131072"),
        ("policy.init_from=meta-llama/Llama-3.1-8B-Instruct policy.model.num_layers=3",
         "in policy.init_from=meta-llama/Llama-3.1-8B-Instruct has 32; remove"),
        ("policy.init_from=Llama-9-8B", "policy.init_from=Llama-9-8B is neither a folder nor a model"),
        ("policy.tensor_model_parallel_size=3", "not divisible by policy.tensor_model_parallel_size=3"),
    ],
)  # fmt: skip
def test_a_message_of_the_planner_names_the_model_as_the_user_did(
    overrides: str, words: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_text(TOO_LARGE)
    with pytest.raises(UserError) as error:
        load_job(str(recipe), overrides.split(), None, GPUS["h100"], None)
    assert words in str(error.value) and tempfile.gettempdir() not in str(error.value)
    job = load_job(str(recipe), [], None, GPUS["h100"], None)
    assert job.config.policy.init_from == "Llama-3.1-8B" and job.vocab_size == 128256


def test_the_phase_that_does_not_fit_is_reported_with_its_rank() -> None:
    job = load_job(str(RECIPE), [], None, GPUS["h100"], None)
    engine = EnginePlan(1, 1, weights=0, token=0, cache=0, working=0, running=1)
    fits, too_large = Phases(10**9, 10**9, 80 * 10**9), Phases(10**9, 10**9, 90 * 10**9)
    assert problem_of(job, [fits, fits], engine) is None
    message = problem_of(job, [fits, too_large], engine)
    assert message == "training takes 90.0 GB on rank 1, and an H100 has 80 GB"


@pytest.mark.slow
def test_a_job_that_does_not_fit_is_reported_with_one_that_does(tmp_path: Path) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_text(TOO_LARGE)
    result = plan(recipe, "--gpus", "4")
    assert result.returncode == 2 and result.stdout, result.stderr
    report = json.loads(result.stdout)
    assert report["fits"] is False and report["parameters"] == 8_030_261_248
    assert "GB on rank 0, and an H100 has 80 GB" in result.stderr
    changes = report["nearest"]
    assert changes and " ".join(changes) in result.stderr
    rerun = plan(recipe, "--gpus", "4", *changes)
    assert rerun.returncode == 0, rerun.stderr
    assert json.loads(rerun.stdout)["fits"] is True


RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_planned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs neither its model, nor its data, nor its GPUs."""
    monkeypatch.setenv("OPO_TEST_DATA", str(tmp_path))
    result = plan(ROOT / "recipes" / name)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["fits"] and report["times"]["step"] > 0
    assert sum(rank["own_parameters"] for rank in report["ranks"]) == report["parameters"] > 0
    if "70b" in name:
        assert report["parameters"] == 70_553_706_496


@pytest.mark.slow
def test_counted_memory_is_what_cpu_ranks_allocate() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench_plan.py"), "--memory"]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
