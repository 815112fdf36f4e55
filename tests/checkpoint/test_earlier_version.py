"""A run folder written by an earlier version (0.1.0, commit 9bf1dec) still works.

Written by `opo train recipes/quickstart.yaml run.dir=run` with two layers, hidden size 32, 60 warm-start
and 4 OPO steps, `algorithm.baseline=auto`, `observe.kl=eval`, `checkpoint.keep_last=2`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from opo_megatron.cli.main import main
from tests.support.paths import DATA
from tests.support.requirements import require
from tests.support.tiny_run import rows

EARLIER = DATA / "run_of_an_earlier_version"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder at its recipe's run.dir."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(EARLIER, "run")
    return Path("run")


def test_it_resumes_and_keeps_its_metrics(run_dir: Path) -> None:
    before = rows(run_dir)
    assert main(["train", str(run_dir / "config.yaml"), "resume=auto", "train.steps=6"]) == 0
    after = rows(run_dir)
    assert after[: len(before)] == before and [row["step"] for row in after] == list(range(7))
    assert after[-1]["grad_norm"] > 0 and "baseline/auto_length" in after[-1] and "eval/kl" in after[-1]


def test_it_replays_bit_for_bit(run_dir: Path) -> None:
    assert main(["replay", str(run_dir), "--step", "4"]) == 0


def test_it_evaluates_to_the_recorded_metrics(run_dir: Path) -> None:
    assert main(["eval", str(run_dir)]) == 0
    result = json.loads((run_dir / "eval" / "step_00000004" / "eval.json").read_text())
    held_out, recorded = result["tasks"]["held_out"], rows(run_dir)[-1]
    assert held_out["reward_mean"] == recorded["eval/accuracy"]
    assert held_out["entropy"] == recorded["eval/entropy"]


def test_opo_report_reads_it(run_dir: Path) -> None:
    require("matplotlib", "make setup-dev")
    assert main(["report", str(run_dir), "--out", "report.html"]) == 0
    page = Path("report.html").read_text()
    assert "held-out accuracy" in page.lower() and "baseline" in page


def test_it_exports_finite_weights_that_differ_from_the_initial_ones(run_dir: Path) -> None:
    assert main(["export", str(run_dir / "checkpoints" / "step_00000004"), "model"]) == 0
    exported, initial = (
        load_file("model/model.safetensors"),
        load_file(run_dir / "start_weights/model.safetensors"),
    )
    assert exported.keys() == initial.keys()
    assert all(tensor.isfinite().all() for tensor in exported.values())
    assert not exported["model.embed_tokens.weight"].equal(initial["model.embed_tokens.weight"])
