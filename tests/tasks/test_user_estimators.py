"""`algorithm.baseline=package.module:function`: what it may return, and one sentence for all else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import compute_advantages
from opo_megatron.algorithm.config import Baseline
from opo_megatron.algorithm.presets import config_of
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.errors import UserError
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.tasks.user_estimator import UserEstimator, load_estimator
from tests.support.fixtures import RECIPE, small_config
from tests.support.paths import ROOT
from tests.support.tiny_run import ONE_STEP, TINY, easy_reward, train

REWARDS = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
LENGTHS, GROUPS = torch.tensor([3, 1, 4, 1]), torch.tensor([0, 0, 1, 1])


@pytest.fixture
def parallel() -> Any:
    yield initialize(small_config())
    shutdown()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a module with a function `f` and returns its path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str, name: str = f"own_{os.urandom(4).hex()}") -> str:
        (tmp_path / f"{name}.py").write_text(body)
        return f"{name}:f"

    return write


def call(path: str, parallel: Parallel) -> Tensor:
    return UserEstimator(path)(parallel, REWARDS, LENGTHS, GROUPS)


@pytest.mark.parametrize(
    "result",
    ["rewards - 0.5", "(rewards - 0.5).tolist()", "(rewards - 0.5).numpy()", "(rewards - 0.5).float()",
     "tuple(r - 0.5 for r in rewards)"],
)  # fmt: skip
def test_advantages_may_be_a_tensor_an_array_or_a_list(result: str, module: Any, parallel: Parallel) -> None:
    found = call(module(f"def f(rewards, lengths, groups):\n    return {result}"), parallel)
    assert found.dtype == torch.float64 and found.tolist() == (REWARDS - 0.5).tolist()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return rewards[:-1]", "returned Tensor of shape [3], but it must be 4 finite numbers"),
        ("return rewards.unsqueeze(1)", "returned Tensor of shape [4, 1]"),
        ("return 0.5", "returned float of shape []"),
        ("return None", "returned NoneType"),
        ("return 'abcd'", "returned str"),
        ("return rewards / 0", "returned inf for sample 0"),
        ("return [0, float('nan'), 0, 0]", "returned nan for sample 1"),
        ("return {1: 2}", "returned dict"),
        ("raise ValueError('too  few\\nsamples')", "raised ValueError (too few samples)"),
        ("raise SystemExit(3)", "raised SystemExit (3)"),
        ("exit()", "raised SystemExit"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        ("return f(rewards, lengths, groups)", "raised RecursionError"),
        ("import os\n    os.fork()\n    raise KeyError('x')", "raised KeyError ('x')"),
    ],
)
def test_whatever_is_wrong_is_one_sentence(body: str, words: str, module: Any, parallel: Parallel) -> None:
    path = module(f"def f(rewards, lengths, groups):\n    {body}")
    with pytest.raises(UserError) as error:
        call(path, parallel)
    sentence = str(error.value)
    assert sentence.startswith(f"algorithm.baseline={path} {words}") and "\n" not in sentence
    assert sentence.endswith("; correct it")


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("x = 1", "f", "AttributeError"),
        ("f = 1", "f", "TypeError (f is not a function)"),
        ("raise SystemExit('bye')", "f", "SystemExit (bye)"),
        ("def f(:", "f", "SyntaxError"),
        ("import no_such_package", "f", "ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_sentence(
    source: str, name: str, words: str, module: Any
) -> None:
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_estimator(module(source))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_preset_is_no_function() -> None:
    assert load_estimator("opo") is None


def test_it_cannot_change_the_run_s_own_tensors(module: Any, parallel: Parallel) -> None:
    before = REWARDS.clone()
    call(module("def f(rewards, lengths, groups):\n    rewards.zero_()\n    return rewards"), parallel)
    assert torch.equal(REWARDS, before)


def test_a_run_takes_its_advantages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiftTask, "reward", easy_reward)
    own = "algorithm.baseline=examples.advantages:minus_median"
    assert train(tmp_path / "run", own, *ONE_STEP) == 0
    rollouts = Rollouts.load(tmp_path / "run" / "rollouts" / "step_00000001.safetensors")
    assert rollouts.rewards is not None and rollouts.advantages is not None
    for group in range(6):
        rewards = rollouts.rewards[rollouts.groups == group]
        expected = rewards - np.median(rewards.numpy())
        assert rollouts.advantages[rollouts.groups == group].tolist() == expected.tolist()
    mean = compute_advantages(
        config_of(Baseline.group_mean), rollouts.rewards, rollouts.response_lengths, rollouts.groups
    )
    assert not torch.equal(mean, rollouts.advantages)


RANKS = """
import os

def exits(rewards, lengths, groups):
    if os.environ.get("RANK") == "1":
        raise SystemExit(0)
    return rewards

def differs(rewards, lengths, groups):
    return rewards + int(os.environ.get("RANK", "0"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", "raised SystemExit (0); correct it"),
        ("differs", "returned other advantages on another rank"),
    ],
)
def test_two_ranks_end_with_the_same_sentence_and_exit_code_2(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "of_ranks.py").write_text(RANKS)
    arguments = [*TINY, "train.steps=1", f"algorithm.baseline=of_ranks:{name}", f"run.dir={tmp_path / 'run'}"]
    finished = subprocess.run(
        [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), *arguments, "--nproc", "2"],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 2, finished.stderr[-2000:]
    assert words in " ".join(finished.stderr.split()) and "Traceback" not in finished.stderr


def test_a_resumed_run_must_have_the_same_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = UserEstimator("examples.advantages:minus_median")
    assert set(estimator.fingerprint) == {"algorithm.baseline"}
    copy = tmp_path / "advantages_copy.py"
    shutil.copy(ROOT / "examples" / "advantages.py", copy)
    copy.write_text(copy.read_text() + "\nCHANGED = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    other = UserEstimator("advantages_copy:minus_median")
    assert json.dumps(other.fingerprint) != json.dumps(estimator.fingerprint)
