"""Exact mode's Triton operations: in Triton's interpreter, and compiled for an H100 without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.compiled import compile_for_hopper
from bench.exact_cases import cases

from opo_megatron.kernels import exact

CASES = cases()
QUICK = ("attention, training", "linear, down")
"""The others are compiled by the slow tests."""
FOLDER = Path(__file__).parent


def run_in_interpreter(file: str, timeout: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", exact.INTERPRETER_VARIABLE: "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_operations_have_the_same_bits_in_any_batch_in_the_interpreter() -> None:
    run_in_interpreter("exact_in_interpreter.py", 250)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_step_of_engine_and_policy_has_no_difference_in_the_interpreter() -> None:
    run_in_interpreter("exact_step_in_interpreter.py", 1700)


def test_a_tensor_on_a_cpu_takes_the_torch_operations() -> None:
    assert not exact.uses_triton(torch.zeros(1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_kernels_compile_for_hopper_without_spills(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for_hopper(CASES[name].case)
    assert compiled.spills == 0 and compiled.programs_per_multiprocessor >= 1
    if name.startswith(("attention, t", "attention, d", "linear", "LM head")):
        assert "mma" in compiled.ptx, "products are to be on tensor cores"
