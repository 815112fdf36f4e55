"""Math problems through the task and the whole loop, graded in worker processes."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from opo_megatron.build import frozen_policy, open_generation
from opo_megatron.cli.main import main
from opo_megatron.config import load_config
from opo_megatron.config.schema import TaskConfig
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.observe.console import Display
from opo_megatron.resilience.watchdog import Watchdog
from opo_megatron.rollout.engine import Sampling
from opo_megatron.rollout.requests import requests_for
from opo_megatron.tasks.text import TextTask
from tests.support.fixtures import RECIPE
from tests.support.requirements import require

SMOKE = RECIPE.parent / "math_smoke.yaml"

PROBLEMS = [
    {"question": f"What is {i} + 1/2?", "answer": rf"It is $\boxed{{\frac{{{2 * i + 1}}}{{2}}}}$."}
    for i in range(40)
]


@pytest.fixture
def task(tmp_path: Path) -> TextTask:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return TextTask(TaskConfig(name="text", data=str(path), verifier="math", verifier_default=0.25))


def test_responses_are_graded_by_value_and_in_order(task: TextTask) -> None:
    prompts = [task.prompt("train", i) for i in range(8)]
    assert all(prompt.answer.startswith(r"\frac") for prompt in prompts)
    numerators = [int(prompt.answer.split("{")[1].split("}")[0]) for prompt in prompts]
    right = [list(rf"so \boxed{{{n / 2}}}".encode()) for n in numerators]
    wrong = [list(rf"so \boxed{{{n / 2 + 1}}}".encode()) for n in numerators]
    mixed = [(right if i % 3 else wrong)[i] for i in range(8)]
    assert task.rewards(prompts, mixed) == [float(bool(i % 3)) for i in range(8)]
    assert task.reward(prompts[0], list(b"no box")) == 0.0
    assert task.failures == 0
    task.close()


def test_verifier_failures_get_the_default_reward_and_are_counted(tmp_path: Path) -> None:
    require("math_verify", "pip install -e '.[math]'")
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    limits = {"verifier": "math_strict", "verifier_seconds": 1.0, "verifier_default": 0.25}
    task = TextTask(TaskConfig(name="text", data=str(path), **limits))
    prompts = [task.prompt("train", 0)] * 2
    hanging = list(rb"\boxed{100000000!}")
    assert task.rewards(prompts, [hanging, list(rf"\boxed{{{prompts[0].answer}}}".encode())]) == [0.25, 1.0]
    assert task.failures == 1
    task.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the smoke recipe: GSM8K, the verifier `math`, an evaluation with two samples each."""
    require("math_verify", "pip install -e '.[math]'")
    if not (Path(os.environ.get("OPO_TEST_DATA", "nowhere")) / "gsm8k").is_dir():
        pytest.skip("OPO_TEST_DATA names no folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    folder = tmp_path_factory.mktemp("math") / "run"
    assert main(["train", str(SMOKE), f"run.dir={folder}"]) == 0
    return folder


def test_gsm8k_runs_through_the_whole_loop(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["run/verifier_failures"] == 0 for row in rows)
    for row in (rows[0], rows[3]):
        assert row["eval/problems"] == 16 and 0 <= row["eval/pass@1"] <= row["eval/pass@2"] <= 1
        # A random policy over 257 byte tokens: nearly uniform, few repetitions, dissimilar responses.
        assert 4.5 < row["eval/entropy"] < 5.56 and row["eval/rep_4"] < 0.01 and row["eval/self_bleu"] < 0.2


@torch.no_grad()
def test_trained_weights_generate_the_same_in_transformers(run_dir: Path, tmp_path: Path) -> None:
    transformers = require("transformers", "make setup-dev")
    checkpoint, folder = run_dir / "checkpoints" / "step_00000003", tmp_path / "model"
    assert main(["export", str(checkpoint), str(folder)]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"

    config = load_config(
        checkpoint / "config.yaml", [f"run.dir={tmp_path / 'generation'}", "observe.kl=off"], 1
    )
    task, parallel = TextTask(config.task), initialize(config)
    try:
        policy = frozen_policy(config, parallel, 257, checkpoint)
        watchdog = Watchdog(parallel, Path(config.run.dir), 0.0)
        resources = ExitStack()
        generation = open_generation(config, parallel, policy, Display(active=False), watchdog, resources)
        generation.synchronize()
        assert policy.version == 3 and policy.optimizer is None
        prompts = [task.prompt("held_out", i) for i in range(4)]
        sampling = Sampling(max_tokens=12, stop_tokens=task.stop_tokens, seed=(1,), greedy=True)
        ours = generation.generate(requests_for(prompts, 1, parallel), sampling, "test")
    finally:
        resources.close()
        task.close()
        shutdown()
    log_probs = ours.engine_log_prob.split(ours.response_lengths.tolist())
    for prompt, response, log_prob in zip(prompts, ours.responses(), log_probs, strict=True):
        logits = theirs(torch.tensor([[*prompt.tokens, *response]])).logits[0, len(prompt.tokens) - 1 : -1]
        assert logits.argmax(-1).tolist() == response
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        assert float((log_prob - expected).abs().max()) < 2e-5
