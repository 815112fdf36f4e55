"""A disk that is full on one of two ranks raises the same error on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hf_models import save_random_model
from tests.support.paths import ROOT, WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.round_trip import write_recipe

WORKER = WORKERS / "full_disk_worker.py"


@pytest.mark.slow
def test_both_ranks_fail_and_no_folder_is_published(tmp_path: Path) -> None:
    save_random_model("qwen3", tmp_path / "model")
    write_recipe(tmp_path)
    run_ranks_of(WORKER, 2, str(tmp_path / "model"), str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert all("is full" in message for message in results["convert"]), results
    assert all("cannot be written" in message for message in results["save"]), results
    assert not list(tmp_path.glob("out*"))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_an_export_by_two_ranks_ends_when_the_writer_fails(tmp_path: Path) -> None:
    save_random_model("qwen3", tmp_path / "model")
    tool = "{ulimit} exec {python} {root}/tools/{name}.py {source} {target} --tensor-model-parallel-size 2"

    def run(name: str, source: str, target: str, ulimit: str = "") -> subprocess.CompletedProcess[str]:
        line = tool.format(
            ulimit=ulimit,
            python=sys.executable,
            root=ROOT,
            name=name,
            source=tmp_path / source,
            target=tmp_path / target,
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    assert run("convert_hf_to_megatron", "model", "megatron").returncode == 0
    result = run("export_megatron_to_hf", "megatron", "out", "ulimit -f 8;")
    assert result.returncode == 2 and "is full" in result.stderr and result.stderr.count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "model"]
