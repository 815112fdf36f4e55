"""`opo plan` of a run whose engines are sent slices: bytes by hand arithmetic, for a rank of every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.support.paths import ROOT, WORKERS

RECIPE = ROOT / "recipes" / "opo_llama3_70b.yaml"
STAGES = "0,16,32,48"
BF16 = "policy.fp8=null"
FULL = "rollout.sglang.layout=full"
HIDDEN, FFN, VOCAB, LAYERS, RANKS = 8192, 28672, 128256, 80, 8
MATRICES = HIDDEN * (HIDDEN + 2 * 1024 + HIDDEN + 3 * FFN) // RANKS
"""Elements of an engine rank's matrices of a layer: queries, keys and values, output, gate, up and down."""


def syncs_of(*cases: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", str(WORKERS / "plan_slices_worker.py"), str(RECIPE), STAGES]
    task = "policy.init_from=null,task.tokenizer=bytes,task.chat=false,task.system_prompt=null"
    settings = [",".join(filter(None, (task, case))) for case in cases]
    result = subprocess.run(
        [*command, *settings], env={**os.environ, "OPO_MODEL": "unused", "OPO_DATA": "unused"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout.splitlines()[-1]))


def test_a_rank_of_the_70b_recipe_receives_slices_of_other_stages_alone() -> None:
    """In FP8, and in bf16: a matrix has 1 byte per element and 4 per block, or 2."""
    for sync, matrix in zip(syncs_of("", BF16), (1 + 4 / 128**2, 2), strict=True):
        check(sync, matrix)


def check(sync: dict[str, Any], matrix: float) -> None:
    assert sync["why_full"] is None and sync["nvlink"] == [0, 0, 0, 0]
    layer, ends = MATRICES * matrix + 2 * 2 * HIDDEN, 2 * VOCAB * HIDDEN // RANKS
    whole = LAYERS * layer + 2 * ends + 2 * HIDDEN
    lacking = [whole - LAYERS // 4 * layer - own for own in (ends, 0, 0, ends + 2 * HIDDEN)]
    assert sync["network"] == pytest.approx(lacking, abs=1000)  # 16 bytes of padding a tensor
    assert sync["bytes"] == pytest.approx(whole, abs=1000)
    assert max(sync["network"]) <= 13.4e9 and sync["seconds"] <= 1.5


@pytest.mark.slow
def test_full_tensors_would_be_nearly_eight_times_as_much() -> None:
    full, cut = syncs_of(f"{BF16},{FULL}", BF16)
    assert full["why_full"] == FULL and cut["why_full"] is None
    assert min(full["network"]) > 7.7 * max(cut["network"]) and min(full["nvlink"]) > 29e9
