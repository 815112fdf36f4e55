"""One server, updated under every layout and by every transport: its weights are the same bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from opo_megatron.rollout.sglang.server import Server, write_model_config
from opo_megatron.tasks.lift import LiftTask
from tests.support.fixtures import RECIPE, SMALL_MODEL, VOCAB_SIZE, small_config
from tests.support.paths import WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.servers import ROOT, processes_of, sglang_python

pytestmark = pytest.mark.slow

WORKER = WORKERS / "sync_worker.py"
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
VPP2 = "policy.virtual_pipeline_model_parallel_size=2"
DISTRIBUTED, DISK = "rollout.sglang.transport=distributed", "rollout.sglang.transport=disk"
CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "distributed": (1, (DISTRIBUTED,)),
    "disk": (1, (DISK,)),
    "tp2": (2, (TP2,)),
    "pp2": (2, (PP2,)),
    "pp2 vpp2, distributed": (2, (PP2, VPP2, DISTRIBUTED)),
    "dp2, disk": (2, (DISK,)),
    "tp2 pp2": (4, (TP2, PP2)),
    "small buckets": (1, ("policy.weight_bucket_mib=0.01",)),
}


def start_server(folder: Path, vocab_size: int) -> Server:
    config = small_config(
        f"run.dir={folder}",
        f"rollout.sglang.python={sglang_python()}",
        "rollout.engine=sglang",
        "rollout.sglang.max_running_requests=64",
        f"rollout.sglang.api_key_file={folder / 'key'}",
    )
    write_model_config(config, vocab_size, folder / "model")
    server = Server(config, folder / "model", folder / "server.log", "server", None)
    server.start(lambda line: None)
    return server


def key_file(server: Server) -> str:
    """The setting with which a run may use the server."""
    return f"rollout.sglang.api_key_file={server.settings.api_key_file}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("external")
    server = start_server(folder, VOCAB_SIZE)
    try:
        yield server
    finally:
        server.stop()
    assert processes_of(folder) == []


@pytest.fixture(scope="module")
def expected(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return probe_after_sync(server, tmp_path_factory.mktemp("expected"), "one process")


def probe_after_sync(server: Server, folder: Path, case: str) -> dict:
    ranks, overrides = CASES[case]
    output = folder / "probe.json"
    arguments = (str(output), server.url, f"run.dir={folder}", key_file(server), *overrides)
    if ranks == 1:
        subprocess.run([sys.executable, str(WORKER), *arguments], cwd=ROOT, timeout=200, check=True)
    else:
        run_ranks_of(WORKER, ranks, *arguments)
    return json.loads(output.read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_servers_replies_are_the_same_bit_for_bit(
    case: str, server: Server, expected: dict, tmp_path: Path
) -> None:
    actual = probe_after_sync(server, tmp_path, case)
    assert actual["tokens"] == expected["tokens"] and actual["log_probs"] == expected["log_probs"]
    assert actual["versions"] == [41] and actual["difference"] < 1e-4


@pytest.fixture(scope="module")
def lift_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(tmp_path_factory.mktemp("lift"), LiftTask.vocab_size)
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("case", [case for case in CASES if case != "one process"])
def test_three_steps_run_under_every_layout_and_transport(
    case: str, lift_server: Server, tmp_path: Path
) -> None:
    ranks, overrides = CASES[case]
    command = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE), f"run.dir={tmp_path / 'run'}"]
    command += [*SMALL_MODEL, *overrides, "rollout.engine=sglang", key_file(lift_server)]
    command += [f"rollout.sglang.urls=[{lift_server.url}]"]
    command += ["warm_start.steps=3", "train.steps=3", "rollout.prompts_per_step=6", "eval.problems=8"]
    command += ["observe.kl=off", "observe.tensorboard=false", "--nproc", str(ranks)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["on_policy/sync_diff_max"] < 1e-4 for row in rows)
    assert all(row["on_policy/logprob_diff_max"] < 1e-4 for row in rows[1:])
