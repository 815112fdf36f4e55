"""The local engine against the policy's full forward pass, under every dense parallel layout.

The engine's weights come from the weight stream, so this also checks the parameter mapping under every
sharding.  Responses must not depend on the number of ranks that generate them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opo_megatron.distributed.process_groups import initialize, shutdown
from tests.support.fixtures import small_config
from tests.support.paths import WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.workers import agreement_worker

WORKER = WORKERS / "agreement_worker.py"
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
SP, VPP2 = "policy.sequence_parallel=true", "policy.virtual_pipeline_model_parallel_size=2"
TIED = "policy.model.tie_embeddings=true"
CP2 = "policy.packing=thd,policy.context_parallel_size=2"
EXACT = "rollout.local.exact=true"
TOLERANCE = 2e-5


def measure(tmp_path: Path, ranks: int, *layouts: str) -> list[dict]:
    output = tmp_path / f"{ranks}.json"
    run_ranks_of(WORKER, ranks, str(output), *layouts)
    results = json.loads(output.read_text())
    assert len(results) == len(layouts)
    return results


def check(one_process: dict, results: list[dict], layouts: tuple[str, ...]) -> None:
    assert one_process["worst"] <= TOLERANCE
    assert len(one_process["tokens"]) == 256
    for layout, result in zip(layouts, results, strict=True):
        assert result["worst"] <= TOLERANCE, layout
        assert result["exchanged"], layout
        assert result["tokens"] == one_process["tokens"], f"{layout or 'dp2'} generated other tokens"


def test_two_ranks_generate_the_same_responses_as_one(tmp_path: Path) -> None:
    layouts = (TP2, "")
    one_process = agreement_worker.measure([], initialize(small_config()))
    shutdown()
    check(one_process, measure(tmp_path, 2, *layouts), layouts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, layouts",
    [
        (2, (f"{TP2},{SP}", PP2, f"{PP2},{VPP2}", CP2)),
        (4, (f"{TP2},{PP2}", f"{TP2},{PP2},{SP}", TP2, PP2, f"{PP2},{VPP2}")),
    ],
)
def test_every_layout_generates_the_same_responses_and_agrees(
    tmp_path: Path, ranks: int, layouts: tuple[str, ...]
) -> None:
    (one_process,) = measure(tmp_path, 1, "")
    check(one_process, measure(tmp_path, ranks, *layouts), layouts)


@pytest.mark.slow
def test_tied_embeddings_agree_under_every_layout(tmp_path: Path) -> None:
    layouts = (f"{TIED},{TP2}", f"{TIED},{PP2}", f"{TIED},{PP2},{VPP2}", f"{TIED},{TP2},{SP}")
    (one_process,) = measure(tmp_path, 1, TIED)
    check(one_process, measure(tmp_path, 2, *layouts), layouts)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_agrees_bit_for_bit_in_exact_mode(tmp_path: Path, ranks: int) -> None:
    layouts = ("", PP2, f"{PP2},{VPP2}", f"{TIED},{PP2}", f"{PP2},policy.max_tokens_per_micro_batch=60")
    results = measure(tmp_path, ranks, *(f"{EXACT},{layout}".rstrip(",") for layout in layouts))
    assert [result["worst"] for result in results] == [0.0] * len(layouts)
