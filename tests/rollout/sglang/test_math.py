"""Math problems with a real server: three graded steps, then `opo eval` of the trained weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.requirements import require
from tests.support.servers import ROOT, processes_of, sglang_python

RECIPE = ROOT / "recipes" / "math_smoke.yaml"


def opo(*arguments: str) -> None:
    command = [sys.executable, "-m", "opo_megatron", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=420, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gsm8k_runs_through_the_whole_loop_and_is_evaluated(tmp_path: Path) -> None:
    require("math_verify", "pip install -e '.[math]'")
    if not (Path(os.environ.get("OPO_TEST_DATA", "nowhere")) / "gsm8k").is_dir():
        pytest.skip("OPO_TEST_DATA names no folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    run_dir = tmp_path / "run"
    engine = ("rollout.engine=sglang", f"rollout.sglang.python={sglang_python()}")
    opo("train", str(RECIPE), f"run.dir={run_dir}", *engine)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["run/verifier_failures"] == 0 and row["on_policy/sync_diff_max"] < 1e-4 for row in rows)
    assert all(0 < row["on_policy/logprob_diff_max"] < 1e-4 for row in rows[1:])
    assert processes_of(run_dir) == []

    opo("eval", str(run_dir), "--problems", "8", "--samples", "4")  # the run's recipe sets the engine
    folder = run_dir / "eval" / "step_00000003"
    assert sorted(path.name for path in folder.iterdir()) == ["eval.json", "samples_held_out.jsonl"]
    report = json.loads((folder / "eval.json").read_text())
    held_out = report["tasks"]["held_out"]
    assert report["sampling"]["engine"] == "sglang" and (held_out["problems"], held_out["samples"]) == (8, 4)
    assert list(held_out["pass@k"]) == ["1", "2", "4"]
    assert 4.5 < held_out["entropy"] < 5.56 and 0 < held_out["length_mean"] <= 48
