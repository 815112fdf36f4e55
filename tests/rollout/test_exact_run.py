"""The quickstart in exact mode, by the real command: sampling and training agree bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import RECIPES, WORKERS
from tests.support.requirements import run_ranks_of

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


LAYOUTS = {
    "pp2": "policy.pipeline_model_parallel_size=2",
    "pp2 vpp2": "policy.pipeline_model_parallel_size=2,policy.virtual_pipeline_model_parallel_size=2",
    "dp2": "policy.packing=padded",
    "cp2": "policy.packing=thd,policy.context_parallel_size=2",
    "tp2": "policy.tensor_model_parallel_size=2,policy.exact_sum_parts=2",
    "tp2 sp": "policy.tensor_model_parallel_size=2,policy.sequence_parallel=true,policy.exact_sum_parts=4",
}


@pytest.mark.slow
def test_every_layout_has_the_engines_digest_of_every_operation(tmp_path: Path) -> None:
    """So that the check names the operation that differs under any of them."""
    output = tmp_path / "results.json"
    run_ranks_of(WORKERS / "exact_digest_worker.py", 2, str(output), *LAYOUTS.values())
    for layout, result in zip(LAYOUTS, json.loads(output.read_text()), strict=True):
        assert result["different"] == [], layout
        assert result["compared"] > 100
