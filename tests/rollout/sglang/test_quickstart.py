"""The whole SGLang quickstart: it learns, and every step is on-policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import ROOT, processes_of, sglang_python


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sixty_steps_reach_the_accuracy_of_the_quickstart(tmp_path: Path) -> None:
    recipe, run_dir = ROOT / "recipes" / "quickstart_sglang.yaml", tmp_path / "run"
    command = [sys.executable, "-m", "opo_megatron", "train", str(recipe), f"run.dir={run_dir}"]
    command.append(f"rollout.sglang.python={sglang_python()}")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(61))
    assert rows[-1]["eval/accuracy"] >= 0.85 > 0.6 > rows[0]["eval/accuracy"]
    assert all(row["on_policy/sync_diff_max"] < 1e-3 for row in rows)
    assert all(0 < row["on_policy/logprob_diff_max"] < 1e-3 for row in rows[1:])
    assert processes_of(run_dir) == []
