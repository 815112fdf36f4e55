"""The layout does not change a step: `tools/check_layouts.py`, which compares with one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent.parent / "tools" / "check_layouts.py"


def check(*layouts: str, timeout: float) -> str:
    command = [sys.executable, str(TOOL), *layouts]
    done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_tp2pp2_and_dp2_with_the_distributed_optimizer_take_the_same_steps_as_one_process() -> None:
    assert check("tp2pp2", "dp2", timeout=200).count("ok") == 4  # two layouts, untied and tied


@pytest.mark.slow
def test_every_layout_takes_the_same_steps_as_one_process() -> None:
    assert "DIFFERS" not in check(timeout=280)
