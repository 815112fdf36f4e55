"""Real servers fed with slices: every parameter of every rank has the bits that full tensors give it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from opo_megatron.rollout.sglang.server import Server, write_model_config
from tests.support.fixtures import small_config
from tests.support.paths import WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.servers import ROOT, processes_of, sglang_python
from tests.support.slice_cases import EP2, ETP1, FAMILIES, PP2, TP2, VPP2, model_overrides

VOCAB = 100
SLICES, FULL = "rollout.sglang.layout=slices", "rollout.sglang.layout=full"
DENSE = {1: ("",), 2: (TP2, f"{PP2},{VPP2}", ""), 4: (f"{TP2},{PP2}",)}
SPARSE = {1: ("",), 2: (TP2, EP2, f"{TP2},{EP2},{ETP1}"), 4: (f"{EP2},{PP2}", f"{TP2},{EP2},{ETP1},{PP2}")}


@contextmanager
def serving(
    folder: Path, sizes: dict[str, object], ranks: int, patch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """A server in bf16 whose ranks write what they hold into the folder."""
    dumping = {
        "PYTHONPATH": str(ROOT / "tests" / "support" / "dumping_loader"),
        "DUMPED_WEIGHTS": str(folder),
    }
    environment = Server.environment
    patch.setattr(Server, "environment", lambda self: environment(self) | dumping)
    config = small_config(
        *recipe_of(sizes, folder),
        f"rollout.sglang.python={sglang_python()}",
        f"rollout.sglang.tensor_parallel_size={ranks}",
        "rollout.engine=sglang",
        "rollout.sglang.max_running_requests=16",
        "rollout.sglang.options.custom_weight_loader=dump_weights.dump",
    )
    write_model_config(config, VOCAB, folder / "model")
    server = Server(config, folder / "model", folder / "server.log", "server", None)
    try:
        server.start(lambda line: None)
        yield server
    finally:
        server.stop()
    assert processes_of(folder) == []


def recipe_of(sizes: dict[str, object], folder: Path) -> list[str]:
    return [*model_overrides(sizes), f"run.dir={folder}", f"rollout.sglang.api_key_file={folder / 'key'}"]


def sent(
    server: Server, folder: Path, sizes: dict[str, object], engine: int, ranks: int, layouts: list[str]
) -> list[dict[str, Any]]:
    """The results of the worker, with the parameters of each rank of the server."""
    output, prefix = folder / f"{ranks}.json", f"of_{ranks}_"
    arguments = (str(output), prefix, server.url, str(engine), *recipe_of(sizes, folder), "--", *layouts)
    run_ranks_of(WORKERS / "slices_worker.py", ranks, *arguments)
    results = json.loads(output.read_text())
    for number, result in enumerate(results):
        result["held"] = [torch.load(folder / f"{prefix}{number}_{rank}.pt") for rank in range(engine)]
    return results  # type: ignore[no-any-return]


def check(
    family: str, engine: int, layouts: dict[int, tuple[str, ...]], folder: Path, patch: pytest.MonkeyPatch
) -> None:
    sizes = FAMILIES[family]
    # In bf16 a router may take other experts than the policy's, which are not replayed here; the servers'
    # own log-probabilities are compared bit for bit.
    limit = math.inf if "num_moe_experts" in sizes else 0.1
    with serving(folder, sizes, engine, patch) as server:
        (full,) = sent(server, folder, sizes, engine, 1, [FULL])
        assert not full["cut"] and full["difference"] < limit
        for ranks, of_ranks in layouts.items():
            cut = [f"{SLICES},{layout}" for layout in of_ranks]
            for layout, result in zip(of_ranks, sent(server, folder, sizes, engine, ranks, cut), strict=True):
                where = f"{family}, {ranks} policy ranks ({layout}), {engine} engine ranks"
                assert result["cut"] and result["difference"] < limit, where
                assert result["tokens"] == full["tokens"], where
                assert result["log_probs"] == full["log_probs"], where
                for expected, held in zip(full["held"], result["held"], strict=True):
                    assert expected.keys() == held.keys()
                    different = [name for name in held if not torch.equal(held[name], expected[name])]
                    assert not different, f"{where}: {different}"


@pytest.mark.slow
@pytest.mark.parametrize("engine", [1, 2])
@pytest.mark.parametrize("family", [family for family in FAMILIES if "blocks" not in family])
def test_slices_of_every_layout_are_what_full_tensors_load(
    family: str, engine: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == 1 and family not in ("llama, tied", "qwen3_moe"):
        pytest.skip("the families differ in how they are cut, and one rank cuts nothing")
    layouts = DENSE if "num_moe_experts" not in FAMILIES[family] else SPARSE
    check(family, engine, layouts, tmp_path, monkeypatch)
