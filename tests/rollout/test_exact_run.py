"""The quickstart in exact mode, by the real command: sampling and training agree bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import RECIPES

RECIPE = RECIPES / "quickstart.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("--nproc", "2", "policy.pipeline_model_parallel_size=2")])
def test_every_step_of_a_run_is_exact(tmp_path: Path, layout: tuple[str, ...]) -> None:
    settings = ("warm_start.steps=60", "train.steps=20", "eval.problems=64", "eval.every_steps=10")
    command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={tmp_path / 'run'}"]
    command += ["rollout.local.exact=true", "on_policy.tolerance=0", *settings, *layout]
    result = subprocess.run(command, timeout=240, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert "are equal bit for bit" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(21))
    assert all(row["on_policy/sync_diff_max"] == 0.0 for row in rows)
    for row in rows[1:]:
        assert row["on_policy/logprob_diff_max"] == row["on_policy/logprob_diff_mean"] == 0.0
        assert row["grad_norm"] > 0
