"""The command of the comparison: rejected arguments; a tiny comparison runs to its record and resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reproduce_paper
from paper.arms import ARMS, SCALES, SeedRuns
from reproduce_paper import Job, best_rate, main, run_jobs

from opo_megatron.config import load_config
from opo_megatron.errors import UserError
from opo_megatron.observe.console import Display
from tests.support.paths import ROOT
from tests.support.requirements import require


@pytest.fixture(autouse=True)
def matplotlib() -> None:
    require("matplotlib", "pip install -e '.[report]'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds is 1"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--scale", "huge"], "huge"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("scale", SCALES)
def test_arms_share_their_learning_rate_and_number_of_samples(scale: str, tmp_path: Path) -> None:
    runs = SeedRuns(tmp_path, SCALES[scale], number=2)
    configs = {}
    for arm in ARMS:
        overrides = [one for one in runs.overrides(arm) if not one.startswith("policy.init_from")]
        configs[arm.name] = load_config(arm.path, overrides)
    learning_rates = {name: config.optimizer.lr for name, config in configs.items()}
    slower = {"grpo_off_policy_lr_1e-4": 1e-4, "grpo_off_policy_lr_3e-5": 3e-5}
    assert learning_rates == dict.fromkeys(configs, 3e-4) | slower
    samples = {
        c.train.steps * c.rollout.prompts_per_step * c.rollout.samples_per_prompt for c in configs.values()
    }
    assert len(samples) == 1
    assert {config.run.seed for config in configs.values()} == {2}
    assert {config.warm_start.steps for config in configs.values()} == {0}


def test_the_best_lr_is_by_the_mean_of_pass_at_1_over_seeds() -> None:
    pass_at_1 = {
        "grpo_off_policy": [0.9, 0.1],
        "grpo_off_policy_lr_1e-4": [0.6, 0.6],
        "grpo_off_policy_lr_3e-5": [0.5, 0.5],
    }
    best, learning_rates = best_rate({name: {"pass@1": list(values)} for name, values in pass_at_1.items()})
    assert best == "grpo_off_policy_lr_1e-4"
    assert learning_rates == {
        "grpo_off_policy": 0.5,
        "grpo_off_policy_lr_1e-4": 0.6,
        "grpo_off_policy_lr_3e-5": 0.5,
    }


def test_a_failed_run_stops_the_others_and_shows_the_end_of_its_log(tmp_path: Path) -> None:
    sleeping = Job("slow", [["sleep", "60"]], tmp_path / "slow.log", 1.0)
    failing = Job("bad", [["sh", "-c", "echo what went wrong; exit 3"]], tmp_path / "bad.log", 1.0)
    later = Job("later", [["touch", str(tmp_path / "later")]], tmp_path / "later.log", 1.0)
    with pytest.raises(UserError, match=r"bad failed with exit code 3.*\n.*\n?.*what went wrong"):
        run_jobs([sleeping, failing, later], 2, Display(active=False), "runs")
    assert sleeping.process is not None and sleeping.process.poll() is not None
    assert not (tmp_path / "later").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tiny_comparison_runs_to_its_record(tmp_path: Path) -> None:
    folder = tmp_path / "paper"
    command = [sys.executable, str(ROOT / "tools" / "reproduce_paper.py")]
    command += ["--scale", "tiny", "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run() -> str:
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run()
    record = json.loads((folder / "paper_tiny.json").read_text())["results"]
    assert record["training samples of every run"] == 5 * 8 * 4
    assert list(record["arms"]) == [arm.name for arm in ARMS]
    assert all(len(values) == 2 for arm in record["arms"].values() for values in arm.values())
    verdicts = {row["verdict"] for row in record["claims"]}
    assert "not testable at this scale" in verdicts and len(record["claims"]) == 38
    assert sum("difference" in row for row in record["claims"]) >= 35
    pictures = sorted(folder.glob("*.png"))
    assert [path.stem for path in pictures] == [f"paper_tiny_{n}" for n in ("baselines", "claims", "curves")]
    assert all(10_000 < path.stat().st_size < 1_000_000 for path in pictures)

    # An interrupted comparison resumes: only missing runs are run.
    runs = SeedRuns(folder, SCALES["tiny"], number=2)
    (runs.run(ARMS[0]) / "eval" / "end" / "eval.json").unlink()
    assert "17 of 18 runs are complete" in run()
    resumed = json.loads((folder / "paper_tiny.json").read_text())["results"]
    for results in (record, resumed):
        del results["seconds of this command"]
    assert resumed == record

    # Initial weights other than the seed's are detected.
    (runs.start / "model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match="did not start from the weights of"):
        reproduce_paper.measure([runs])
