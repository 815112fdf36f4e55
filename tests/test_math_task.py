"""Mathematical problems through the task and the whole loop, graded in processes of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import require
from small import RECIPE

from opo_megatron.cli import main
from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.text import TextTask
from opo_megatron.tasks.worker_pool import WorkerPool

PROBLEMS = [
    {"question": f"What is {i} + 1/2?", "answer": rf"It is $\boxed{{\frac{{{2 * i + 1}}}{{2}}}}$."}
    for i in range(40)
]


@pytest.fixture
def task(tmp_path: Path) -> TextTask:
    require("math_verify", "pip install -e '.[math]'")
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return TextTask(TaskConfig(name="text", data=str(path), verifier="math", verifier_default=0.25))


def test_responses_are_graded_by_value_and_in_order(task: TextTask) -> None:
    prompts = [task.prompt("train", i) for i in range(8)]
    assert all(prompt.answer.startswith(r"\frac") for prompt in prompts)
    top = [int(prompt.answer.split("{")[1].split("}")[0]) for prompt in prompts]
    right = [list(rf"so \boxed{{{n / 2}}}".encode()) for n in top]
    wrong = [list(rf"so \boxed{{{n / 2 + 1}}}".encode()) for n in top]
    mixed = [(right if i % 3 else wrong)[i] for i in range(8)]
    assert task.rewards(prompts, mixed) == [float(bool(i % 3)) for i in range(8)]
    assert task.reward(prompts[0], list(b"no box")) == 0.0
    assert task.failures == 0
    task.close()


def test_what_no_verifier_can_judge_gets_the_default_and_is_counted(task: TextTask) -> None:
    assert isinstance(task._workers, WorkerPool)
    task._workers.seconds = 1.0
    prompts = [task.prompt("train", 0)] * 2
    hangs = list(rb"\boxed{100000000!}")
    assert task.rewards(prompts, [hangs, list(rf"\boxed{{{prompts[0].answer}}}".encode())]) == [0.25, 1.0]
    assert task.failures == 1
    task.close()


def test_gsm8k_through_the_whole_loop(tmp_path: Path) -> None:
    require("math_verify", "pip install -e '.[math]'")
    if not (Path(os.environ.get("OPO_TEST_DATA", "nowhere")) / "gsm8k").is_dir():
        pytest.skip("OPO_TEST_DATA names no folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    run_dir = tmp_path / "run"
    assert main(["train", str(RECIPE.parent / "math_smoke.yaml"), f"run.dir={run_dir}"]) == 0
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["run/verifier_failures"] == 0 for row in rows)
