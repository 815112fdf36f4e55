"""Attention and sampler of an exact server on a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_servers_operations_have_the_rows_of_training_and_local_engine() -> None:
    names = ("interpreted_slot_attention.py", "interpreted_sampler.py")
    programs = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *programs]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPO_EXACT_TRITON": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
