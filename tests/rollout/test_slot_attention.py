"""The attention of an exact server on a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_paged_cache_has_the_rows_of_training_also_in_graphs() -> None:
    program = str(Path(__file__).with_name("interpreted_slot_attention.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", program]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPO_EXACT_TRITON": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
