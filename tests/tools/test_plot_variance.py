"""The figure of a run's variance reports, from rows in the format of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opo_megatron.observe.gradient_noise import UNBIASED, noise_intervals, relative_noise
from tests.support.paths import TOOLS
from tests.support.requirements import require

TOOL = TOOLS / "plot_variance.py"


def report(step: int, scale: float) -> dict[str, float]:
    noise = {f"variance/{name}": scale * (i + 2) for i, name in enumerate(UNBIASED)}
    return {"step": step, "variance/between_prompts": scale, "variance/correlation_length": 0.1} | noise


def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_noise_is_a_ratio_of_sums_without_the_variance_between_prompts() -> None:
    noise = relative_noise([report(1, 1.0), report(3, 5.0)])
    assert UNBIASED[:2] == ("none", "rloo")
    assert noise["none"] == 0.5 and noise["rloo"] == 1 and noise["opo_loo"] == 1.5
    assert relative_noise([report(1, 0.0)]) == {}


def test_intervals_contain_the_ratio_and_shrink_where_reports_agree() -> None:
    agreeing = noise_intervals([report(i, 1.0) for i in range(20)])
    assert all(noise.low == noise.value == noise.high for noise in agreeing.values())
    rows = [report(i, 1.0) | {"variance/opo_loo": 2.0 + i % 5} for i in range(40)]
    spread = noise_intervals(rows)["opo_loo"]
    assert spread.low < spread.value == relative_noise(rows)["opo_loo"] < spread.high
    assert noise_intervals([report(1, 0.0)]) == {}


@pytest.mark.slow
def test_a_run_with_reports_gives_a_picture(tmp_path: Path) -> None:
    require("matplotlib", "pip install -e '.[report]'")
    rows = [{"step": 0}, report(1, 1.0), {"step": 2}, report(3, 2.0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = plot(str(tmp_path))
    assert result.returncode == 0, result.stderr
    picture = (tmp_path / "variance.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.mark.slow
def test_a_run_without_reports_is_one_sentence(tmp_path: Path) -> None:
    require("matplotlib", "pip install -e '.[report]'")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    reasons = {tmp_path: "holds no variance report", tmp_path / "none": "is no folder of a run"}
    for folder, reason in reasons.items():
        result = plot(str(folder))
        assert result.returncode == 2 and reason in result.stderr and result.stderr.count("\n") == 1
