"""The KL to the reference weights does not depend on the parallel layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opo_megatron.distributed.process_groups import initialize, shutdown
from tests.support.fixtures import small_config
from tests.support.paths import WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.workers import kl_worker

WORKER = WORKERS / "kl_worker.py"
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
SP, VPP2 = "policy.sequence_parallel=true", "policy.virtual_pipeline_model_parallel_size=2"
CP2 = "policy.packing=thd,policy.context_parallel_size=2"
TIED, BF16 = "policy.model.tie_embeddings=true", "policy.dtype=bf16"
EXPERTS = "policy.model.num_moe_experts=4,policy.model.moe_ffn_hidden_size=24"


def check(tmp_path: Path, model: str, layouts: tuple[str, ...], tolerance: float) -> None:
    overrides = [part for part in model.split(",") if part]
    expected = kl_worker.measure(tmp_path / "one", overrides, initialize(small_config(*overrides)))
    shutdown()
    assert expected["kl"] > 0.001 and expected["restored"]
    output = tmp_path / "two.json"
    run_ranks_of(WORKER, 2, str(output), *(",".join(filter(None, (model, layout))) for layout in layouts))
    for layout, result in zip(layouts, json.loads(output.read_text()), strict=True):
        assert result["restored"] and result["same"], layout
        assert result["kl"] == pytest.approx(expected["kl"], rel=tolerance), layout
        assert result["kl_per_response"] == pytest.approx(expected["kl_per_response"], rel=tolerance), layout


@pytest.mark.slow
def test_two_ranks_measure_the_kl_of_one_and_restore_their_weights(tmp_path: Path) -> None:
    check(tmp_path, "", (TP2, PP2, CP2, ""), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, layouts, tolerance",
    [
        (TIED, (TP2, PP2, f"{PP2},{VPP2}", f"{TP2},{SP}", ""), 1e-4),
        (BF16, (TP2, PP2, ""), 0.1),
        (EXPERTS, ("policy.expert_model_parallel_size=2", PP2, CP2, ""), 1e-4),
    ],
    ids=["tied", "bf16", "experts"],
)
def test_every_layout_measures_the_same_kl(
    tmp_path: Path, model: str, layouts: tuple[str, ...], tolerance: float
) -> None:
    check(tmp_path, model, layouts, tolerance)
