"""Checkpoints across versions of Megatron-Core: 0.19 resumes those of 0.16, which refuses those of 0.19.

Needs an environment of either version: this one, and the one whose interpreter OPO_OTHER_PYTHON names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.support.fixtures import RECIPE
from tests.support.paths import ROOT, WORKERS
from tests.support.tiny_run import TINY, lasting

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LAUNCH = (
    "from opo_megatron.distributed.launch import run_ranks; import sys; n, *command = sys.argv[1:]; "
    "sys.exit(run_ranks(command, int(n)))"
)
WORKER = WORKERS / "checkpoint_worker.py"
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
EP2 = "policy.model.num_moe_experts=4,policy.model.moe_ffn_hidden_size=32,policy.expert_model_parallel_size=2"
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def pythons() -> tuple[str, str]:
    """The interpreters with the older and the newer Megatron-Core."""
    other = os.environ.get("OPO_OTHER_PYTHON")
    if other is None:
        pytest.skip("OPO_OTHER_PYTHON names no interpreter of an environment with the other Megatron-Core")
    versions = {}
    for python in (sys.executable, other):
        code = "from importlib.metadata import version; print(version('megatron-core'))"
        output = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
        versions[output.strip()] = python
    assert sorted(versions) == ["0.16.1", "0.19.2"], f"OPO_OTHER_PYTHON={other} has the same Megatron-Core"
    return versions["0.16.1"], versions["0.19.2"]


def run(command: Sequence[str]) -> tuple[int, str]:
    """Exit code, and output of both kinds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=400)
    return result.returncode, result.stdout + result.stderr


def work(python: str, ranks: int, mode: str, run_dir: Path, output: Path, overrides: str) -> dict:
    command = [python, str(WORKER), mode, str(run_dir), str(output), overrides]
    code, text = run([python, "-c", LAUNCH, str(ranks), *command])
    assert code == 0, text
    return torch.load(output)


@pytest.mark.parametrize(
    ("ranks", "saved_under", "loaded_under"),
    [(1, "", ""), (2, "", TP2), (2, TP2, PP2), (2, PP2, ""), (2, EP2, EP2)],
    ids=["one rank", "dp2 → tp2", "tp2 → pp2", "pp2 → dp2", "ep2"],
)
def test_the_newer_loads_every_tensor_of_the_older_bit_for_bit(
    pythons: tuple[str, str], tmp_path: Path, ranks: int, saved_under: str, loaded_under: str
) -> None:
    older, newer = pythons
    saved = work(older, ranks, "save", tmp_path / "run", tmp_path / "saved.pt", saved_under)
    loaded = work(newer, ranks, "load", tmp_path / "run", tmp_path / "loaded.pt", loaded_under)
    assert saved.keys() == loaded.keys() and any(name.startswith("exp_avg_sq/") for name in saved)
    for name, tensor in saved.items():
        if name.startswith("next"):
            torch.testing.assert_close(loaded[name], tensor, rtol=1e-4, atol=ROUNDING, msg=name)
        else:
            assert loaded[name].equal(tensor), name


@pytest.fixture(scope="module")
def run_of_the_older(pythons: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("older") / "run"
    assert train(pythons[0], folder, "train.steps=6")[0] == 0
    return folder


def train(python: str, run_dir: Path, *overrides: str) -> tuple[int, str]:
    settings = (
        f"run.dir={run_dir}",
        *TINY,
        "warm_start.steps=60",
        "optimizer.schedule=constant",
        "resume=auto",
    )
    return run([python, "-m", "opo_megatron", "train", str(RECIPE), *settings, *overrides])


def test_a_run_of_the_older_resumes_under_the_newer_with_the_same_curve(
    pythons: tuple[str, str], run_of_the_older: Path, tmp_path: Path
) -> None:
    resumed = tmp_path / "run"
    shutil.copytree(run_of_the_older, resumed)
    for checkpoint in (resumed / "checkpoints").glob("step_*[46]"):
        shutil.rmtree(checkpoint)
    code, text = train(pythons[1], resumed, "train.steps=6")
    assert code == 0 and "resumed from" in text and "deprecated" not in text, text
    expected, found = lasting(run_of_the_older), lasting(resumed)
    assert max(row.get("grad_norm", 0.0) for row in expected[3:]) > 0, (
        "no step after the resume had a gradient"
    )
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(7))
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            if not key.startswith("on_policy/"):  # these are the rounding
                assert after[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (before["step"], key)


def test_the_older_refuses_a_run_of_the_newer_in_one_sentence(
    pythons: tuple[str, str], run_of_the_older: Path, tmp_path: Path
) -> None:
    older, newer = pythons
    assert train(newer, tmp_path / "run", "train.steps=2")[0] == 0
    code, text = train(older, tmp_path / "run", "train.steps=4")
    assert code == 2 and "Traceback" not in text and "damaged" not in text
    assert (
        "was written by Megatron-Core 0.19 or newer, and 0.16.1 cannot read it; resume the run with" in text
    )
    assert train(newer, tmp_path / "run", "train.steps=4")[0] == 0
