"""The training loop with a real server: three steps from an SFT checkpoint, by the real command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from opo_megatron.batch.rollouts import Rollouts
from tests.support.servers import ROOT, processes_of, sglang_python

WARM_STEPS, STEPS = 40, 3
RECIPE = ROOT / "recipes" / "quickstart_sglang.yaml"
SMALL = (
    f"warm_start.steps={WARM_STEPS}",
    "eval.problems=48",
    "eval.greedy=false",
    "observe.kl=off",
    "algorithm.baseline=energy_loo",
    "algorithm.variance_every=2",
)


def opo_train(run_dir: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={run_dir}", *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    python, folder = sglang_python(), tmp_path_factory.mktemp("sglang")
    opo_train(folder / "warm", *SMALL, "rollout.engine=local", "train.steps=1")
    checkpoint = folder / "warm" / "checkpoints" / f"warm_start_{WARM_STEPS:08d}"
    opo_train(
        folder / "run",
        *SMALL,
        f"resume={checkpoint}",
        "--allow",
        "rollout.engine",
        f"train.steps={STEPS}",
        f"rollout.sglang.python={python}",
        "rollout.sglang.timeout_seconds=120",
    )
    return folder / "run"


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_token_carries_the_policys_weight_version(run_dir: Path) -> None:
    for step in range(1, STEPS + 1):
        rollouts = Rollouts.load(run_dir / "rollouts" / f"step_{step:08d}.safetensors")
        assert rollouts.weight_versions is not None and len(rollouts) == 48 * 8
        assert rollouts.weight_versions.unique().tolist() == [WARM_STEPS + step - 1]


def test_probe_and_rollouts_agree_with_the_policy_up_to_rounding(run_dir: Path) -> None:
    rows = rows_of(run_dir)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert all(0 <= row["on_policy/sync_diff_max"] < 1e-4 for row in rows)
    for row in rows[1:]:
        assert 0 < row["on_policy/logprob_diff_max"] < 1e-4
        assert row["on_policy/ess"] == pytest.approx(1, abs=1e-6)
        assert row["on_policy/share_above_1e-03"] == 0
        assert all(math.isfinite(value) for value in row.values())


def test_responses_end_with_the_tasks_stop_token_or_are_truncated(run_dir: Path) -> None:
    rollouts = Rollouts.load(run_dir / "rollouts" / "step_00000001.safetensors")
    stopped = [
        r[-1] for r, end in zip(rollouts.responses(), rollouts.finish_reasons, strict=True) if end == 0
    ]
    assert len(set(stopped)) == 1 and len(stopped) > 0
    assert int(rollouts.response_lengths.max()) <= 24


def test_energies_of_sglang_rollouts_come_from_a_forward_pass(run_dir: Path) -> None:
    """The variance report computes them again: both must give the same advantages."""
    assert Rollouts.load(run_dir / "rollouts" / "step_00000001.safetensors").energy is None
    row = rows_of(run_dir)[1]
    assert row["variance/this_run"] == pytest.approx(row["variance/energy_loo"], rel=1e-4)
    assert row["variance/this_run"] != pytest.approx(row["variance/opo_loo"], rel=1e-3)


def test_no_server_process_is_left(run_dir: Path) -> None:
    assert processes_of(run_dir) == []
