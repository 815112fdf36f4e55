"""bench_exact.py --device cuda: what it times, and what it says where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import TOOLS


def test_what_is_timed_computes_the_same() -> None:
    program = str(Path(__file__).with_name("interpreted_bench_exact.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", program]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPO_EXACT_TRITON": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so() -> None:
    command = [sys.executable, str(TOOLS / "bench_exact.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(
        "error: --device cuda, but torch sees no GPU; run this on a machine with one"
    )
