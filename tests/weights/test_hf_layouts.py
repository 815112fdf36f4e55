"""Hugging Face folders under every layout: read, streamed, saved under one layout and exported under
another, all bit for bit, and log-probabilities against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.hf_models import FAMILIES, assert_same_tensors, log_probs_of, save_random_model, tensors_of
from tests.support.paths import WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.round_trip import write_recipe

WORKER = WORKERS / "hf_worker.py"
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
VPP2, SP = "policy.virtual_pipeline_model_parallel_size=2", "policy.sequence_parallel=true"
CP2 = "policy.packing=thd,policy.context_parallel_size=2"
EP2, ETP1 = "policy.expert_model_parallel_size=2", "policy.expert_tensor_parallel_size=1"

DENSE = {2: (TP2, PP2, f"{PP2},{VPP2}"), 4: (f"{TP2},{PP2}", f"{TP2},{PP2},{VPP2},{SP}")}
EXPERTS = {
    2: (EP2, PP2, f"{TP2},{SP}", f"{TP2},{SP},{EP2},{ETP1}", CP2, f"{CP2},{EP2}"),
    4: (f"{EP2},{PP2}", f"{TP2},{SP},{PP2}", f"{CP2},{TP2},{SP},{EP2},{ETP1}"),
}


def check(family: str, ranks: int, layouts: tuple[str, ...], work: Path) -> None:
    folder = work / "model"
    model = save_random_model(family, folder, num_layers=4, shard_size="40KB")
    write_recipe(work)  # before the ranks start, which would race to write it
    run_ranks_of(WORKER, ranks, str(folder), str(work), *layouts)
    results, expected = json.loads((work / "results.json").read_text()), tensors_of(folder)
    reference = torch.tensor(log_probs_of(model))
    for i, layout in enumerate(layouts):
        difference = (torch.tensor(results[i]["log_probs"]) - reference).abs().max()
        assert float(difference) <= 1e-5, layout
        assert_same_tensors(tensors_of(work / f"exported{i}"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips_under_every_layout(family: str, ranks: int, tmp_path: Path) -> None:
    layouts = DENSE if FAMILIES[family].num_moe_experts is None else EXPERTS
    check(family, ranks, layouts[ranks], tmp_path)
