"""LM head, energies and gradient inner products under parallel layouts, against float64 and one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.weights.random_init import random_weights
from tests.support import dense_reference
from tests.support.fixtures import RECIPE, VOCAB_SIZE, small_config
from tests.support.paths import ROOT, WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.tiny_run import TINY
from tests.support.workers import algorithm_worker
from tests.support.workers.algorithm_worker import HEAD_SHAPES, TEMPERATURE

WORKER = WORKERS / "algorithm_worker.py"
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
TP4 = "policy.tensor_model_parallel_size=4,policy.model.num_query_groups=4"
SP, VPP2 = "policy.sequence_parallel=true", "policy.virtual_pipeline_model_parallel_size=2"
PACKED = "policy.packing=thd"
CP2 = f"{PACKED},policy.context_parallel_size=2"
PLAIN = "policy.distributed_optimizer=false"
TIED = "policy.model.tie_embeddings=true"
SUMS = ("energy", "energy_hidden", "gram_output", "gram_output_energy", "gram_all", "gram_all_energy")


def assert_near(result: Tensor, expected: Tensor, what: str, relative: float = 1e-5) -> None:
    """Bounds the largest absolute error relative to the largest absolute value."""
    error = float((result.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= relative, f"{what}: {error:.1e}"


def reference(overrides: str) -> dict[str, Any]:
    """Gradients and inner products in float64, from the dense reference, sample by sample."""
    config = small_config(*[part for part in overrides.split(",") if part])
    model, rollouts = config.policy.model, algorithm_worker.batch_of()
    source = random_weights(model, VOCAB_SIZE, config.run.seed)
    names = weight_names(overrides)
    weights = {name: source(name)[:].double().requires_grad_() for name in names}
    total = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    per_sample: list[dict[str, Tensor]] = []
    for i in range(len(rollouts)):
        one = rollouts.select([i])
        sequence, prompt = one.sequences()[0].tolist(), int(one.prompt_lengths)
        of_all = dense_reference.log_probs(model, weights, sequence[:prompt], sequence[prompt:], TEMPERATURE)
        log_prob = of_all[one.response_positions() - prompt].sum()
        gradients = dict(zip(names, torch.autograd.grad(log_prob, list(weights.values())), strict=True))
        per_sample.append(gradients)
        for name in names:
            total[name] += -float(rollouts.advantages[i]) / 100.0 * gradients[name]
    flat = torch.stack([torch.cat([g.flatten() for g in gradients.values()]) for gradients in per_sample[:8]])
    expected: dict[str, Any] = {"gradients": total, "gram_all": flat @ flat.T}
    if not model.tie_embeddings:
        head = torch.stack([gradients["lm_head.weight"].flatten() for gradients in per_sample[:8]])
        expected["gram_output"] = head @ head.T
    return expected


def weight_names(overrides: str) -> list[str]:
    parallel = initialize(small_config())
    policy = algorithm_worker.small_policy(
        small_config(*[part for part in overrides.split(",") if part and "parallel" not in part]), parallel
    )
    names = [name for bucket in policy.stream_weights() for name, _ in bucket]
    shutdown()
    return names


def check(tmp_path: Path, ranks: int, model: str, *layouts: str) -> None:
    parts = [part for part in model.split(",") if part]
    expected = reference(model)
    one_process = algorithm_worker.measure(parts, initialize(small_config(*parts)))
    shutdown()
    output = tmp_path / "results.pt"
    overrides = [",".join(filter(None, (model, layout))) for layout in layouts]
    run_ranks_of(WORKER, ranks, str(output), *overrides)
    for layout, result in zip(("one process", *layouts), (one_process, *torch.load(output)), strict=True):
        for name, gradient in result.get("gradients", {}).items():
            assert_near(gradient, expected["gradients"][name], f"{layout}: gradient of {name}")
        for name in ("gram_all", "gram_output"):
            if name in expected:
                assert_near(torch.tensor(result[name]), expected[name], f"{layout}: {name}", 2e-5)
        for name in SUMS:
            assert_near(
                torch.tensor(result[name]), torch.tensor(one_process[name]), f"{layout}: {name}", 2e-5
            )
        for shape, values in zip(HEAD_SHAPES, result.get("head", []), strict="head" in result):
            check_head(shape, values, layout)
    assert any("gradients" in result for result in torch.load(output)) or ranks > 2


def check_head(shape: tuple[int, int, int], values: dict[str, Tensor], layout: str) -> None:
    """Against float64 autograd of the definition."""
    inputs = algorithm_worker.head_inputs(shape)
    hidden = inputs["hidden"].double().requires_grad_()
    weight = inputs["weight"].double().requires_grad_()
    log_pi = torch.log_softmax(hidden @ weight.T / 1.3, -1)
    log_prob = log_pi[torch.arange(len(hidden)), inputs["targets"]]
    loss = -inputs["advantages"].double() * log_prob + 0.1 * log_prob**2
    d_hidden, d_weight = torch.autograd.grad(loss.sum(), (hidden, weight))
    expected = {
        "log_prob": log_prob,
        "entropy": -(log_pi.exp() * log_pi).sum(-1),
        "sum_squares": log_pi.exp().square().sum(-1),
        "loss": loss,
        "d_hidden": d_hidden,
        "d_weight": d_weight,
    }
    for name, value in expected.items():
        assert_near(values[name], value.detach(), f"{layout}: head {shape}: {name}")


def test_two_ranks_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    check(tmp_path, 2, "", TP2, PP2, "", f"{PACKED},{PP2},{VPP2}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, model, layouts",
    [
        (2, "", (f"{TP2},{SP}", f"{PP2},{VPP2}")),
        (2, "", (PACKED, f"{PACKED},{TP2},{SP}", f"{PACKED},{PP2}")),
        (2, TIED, (f"{PACKED},{TP2},{SP}", f"{PACKED},{PP2},{VPP2}")),
        (2, "", (CP2, f"{CP2},{PLAIN},policy.recompute=selective", f"{CP2},{PLAIN},policy.recompute=full")),
        (4, "", (f"{CP2},{PLAIN},{TP2},{SP}", f"{CP2},{PLAIN},{PP2},{VPP2}", f"{CP2},{PP2}", CP2)),
        (4, "", (f"{PACKED},{TP2},{PP2},{VPP2},{SP}", f"{PACKED},{TP2}")),
        (2, TIED, (TP2, f"{TP2},{SP}", PP2, f"{PP2},{VPP2}", "")),
        (4, "", (f"{TP2},{PP2}", TP2, f"{PP2},{VPP2}")),
        (4, "policy.model.num_query_groups=4", (TP4.split(",")[0],)),
    ],
    ids=[
        "two",
        "packed-two",
        "packed-tied",
        "context-two",
        "context-four",
        "packed-four",
        "tied",
        "four",
        "tp4",
    ],
)
def test_every_layout_has_the_gradients_of_one_process(
    tmp_path: Path, ranks: int, model: str, layouts: tuple[str, ...]
) -> None:
    check(tmp_path, ranks, model, *layouts)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [f"{CP2},{PLAIN}", PP2, f"{PACKED},{PP2},{VPP2}", TP2])
def test_every_layout_has_the_gradients_of_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Also energies and inner products; the float64 reference leaves given tokens out of the loss."""
    monkeypatch.setenv(algorithm_worker.CONVERSATIONS, "1")
    check(tmp_path, 2, "", layout)


# ---------------------------------------------------------------------- whole runs

EASY = """
from opo_megatron.tasks.lift import LiftTask

class Easy(LiftTask):
    def __init__(self, config):
        super().__init__()

    def reward(self, prompt, response):
        return float(sum(response) % 2)
"""
LAYOUTS = {
    "tp2": (TP2,),
    "pp2": (PP2,),
    "dp2": (),
    "cp2": ("policy.packing=thd", "policy.context_parallel_size=2"),
}


def run_of(folder: Path, name: str, ranks: int, *overrides: str) -> tuple[list[dict[str, Any]], Rollouts]:
    """Metrics of a tiny run, and the rollouts of its last step."""
    (folder / "easy.py").write_text(EASY)
    arguments = [str(RECIPE), f"run.dir={folder / name}", *TINY, *overrides, "task.name=easy:Easy"]
    arguments += ["task.max_prompt_tokens=16", "train.steps=2", "eval.every_steps=0", "eval.problems=4"]
    subprocess.run(
        [sys.executable, "-m", "opo_megatron", "train", *arguments, "--nproc", str(ranks)],
        check=True, timeout=300, cwd=folder, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return rows, Rollouts.load(folder / name / "rollouts" / "step_00000002.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "settings",
    [
        ("algorithm.baseline=otb_loo",),
        ("algorithm.baseline=otb_loo", "on_policy.action=correct"),
        ("algorithm.baseline=james_stein",),
        ("algorithm.baseline=auto", "algorithm.shrink=true", "algorithm.keep_lone=true"),
        ("rollout.fill=groups_with_signal", "rollout.fill_rounds=3", "rollout.samples_per_prompt=2"),
    ],
    ids=["otb_loo", "otb_loo-measured", "james_stein", "james_stein-auto", "fill"],
)
def test_estimators_take_the_same_steps_under_every_layout(tmp_path: Path, settings: tuple[str, ...]) -> None:
    """Responses, advantages and gradients of whole runs, against one process; reports as well."""
    reports = ("algorithm.variance_every=1", "algorithm.variance_prompts=4")
    expected, samples = run_of(tmp_path, "one", 1, *settings, *reports)
    assert expected[1]["grad_norm"] > 0
    for name, layout in LAYOUTS.items():
        rows, rollouts = run_of(tmp_path, name, 2, *settings, *reports, *layout)
        assert torch.equal(rollouts.response_tokens, samples.response_tokens), name
        assert torch.equal(rollouts.prompt_ids, samples.prompt_ids), name
        assert rollouts.advantages is not None and samples.advantages is not None
        torch.testing.assert_close(rollouts.advantages, samples.advantages, rtol=1e-4, atol=1e-5)
        if samples.token_advantages is not None:
            assert rollouts.token_advantages is not None
            torch.testing.assert_close(
                rollouts.token_advantages, samples.token_advantages, rtol=1e-4, atol=1e-5
            )
        for row, other in zip(rows[1:], expected[1:], strict=True):
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), name
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5), name
            for estimator in ("otb", "otb_loo", "james_stein", "opo", "this_run"):
                key = f"variance/{estimator}"
                assert row[key] == pytest.approx(other[key], rel=1e-3), (name, key)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "objective, options",
    [
        ("gspo", ("algorithm.objective_options={epsilon_low: 0.01, epsilon_high: 0.01}",)),
        ("bapo", ("algorithm.objective_options={target: 3}",)),
        ("m2po", ("algorithm.objective_options={threshold: 1.0e-4}",)),
    ],
)
def test_objectives_take_the_same_steps_under_every_layout(
    tmp_path: Path, objective: str, options: tuple[str, ...]
) -> None:
    """Three updates per batch, the last two off-policy: ratios, bounds and masks are the same."""
    settings = (
        f"algorithm.objective={objective}",
        "algorithm.updates_per_batch=3",
        "optimizer.lr=3e-3",
        *options,
    )
    expected, samples = run_of(tmp_path, "one", 1, *settings)
    without, _ = run_of(tmp_path, "clipped", 1, *settings[1:3], "algorithm.objective=clipped")
    assert expected[1]["grad_norm"] != pytest.approx(without[1]["grad_norm"], rel=1e-4)
    for name, layout in LAYOUTS.items():
        rows, rollouts = run_of(tmp_path, name, 2, *settings, *layout)
        assert torch.equal(rollouts.response_tokens, samples.response_tokens), name
        for row, other in zip(rows[1:], expected[1:], strict=True):
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), name
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5), name
