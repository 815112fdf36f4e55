"""A server as a job script starts it, on a node of its own: who reaches it, and how the ranks do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.server import free_port
from opo_megatron.tasks.lift import LiftTask
from tests.support.fixtures import SMALL_MODEL
from tests.support.paths import RECIPES
from tests.support.servers import ROOT, sglang_python

pytestmark = pytest.mark.slow

SETTINGS = (
    str(RECIPES / "quickstart_sglang.yaml"), *SMALL_MODEL, f"policy.model.vocab_size={LiftTask.vocab_size}",
    "policy.device=cpu", "warm_start.steps=2", "train.steps=1", "rollout.prompts_per_step=4",
    "eval.problems=8", "observe.kl=off", "observe.tensorboard=false", "rollout.sglang.transport=distributed",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    port, python = free_port(), f"rollout.sglang.python={sglang_python()}"
    environment = {
        **os.environ,
        "OPO_PYTHON": sys.executable,
        "OPO_ENGINE_ADDRESSES": "10.255.255.1\n127.0.0.1",
        "SLURM_PROCID": "1",
    }
    file = f"rollout.sglang.api_key_file={folder / 'engine_key'}"
    command = ["bash", "slurm/node.sh", "--alone", "opo_megatron", "serve", *SETTINGS, python, file]
    with (folder / "engine.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        client, deadline = Client(f"http://127.0.0.1:{port}", 60), time.monotonic() + 200
        while not client.is_healthy():
            assert server.poll() is None and time.monotonic() < deadline, (folder / "engine.log").read_text()
            time.sleep(0.5)
        listening = [
            one.laddr for one in psutil.Process(server.pid).net_connections() if one.status == "LISTEN"
        ]
        assert [(address.ip, address.port) for address in listening] == [("127.0.0.1", port)]
        yield client.url
    finally:
        server.terminate()
        server.wait(30)


def train(folder: Path, name: str, url: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opo_megatron", "train", *SETTINGS, f"run.dir={folder / name}"]
    command += [f"rollout.sglang.urls=[{url}]", *overrides, "--nproc", "2"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


def test_ranks_with_the_key_file_train_and_write_the_key_nowhere(folder: Path, url: str) -> None:
    result = train(folder, "run", url, f"rollout.sglang.api_key_file={folder / 'engine_key'}")
    assert result.returncode == 0, result.stdout + result.stderr
    key = (folder / "engine_key").read_text().strip()
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "engine_key"]
    assert len(files) > 10 and [path for path in files if key.encode() in path.read_bytes()] == []
    assert key not in result.stdout + result.stderr
    processes = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert any("serve.py" in word for command in processes for word in command)
    assert not any(key in word for command in processes for word in command)


@pytest.mark.parametrize(
    "path", ["/generate", "/update_weights_from_distributed", "/release_memory_occupation"]
)
@pytest.mark.parametrize(("key", "words"), [(None, "asks for a key"), ("wrong", "refuses the key")])
def test_nobody_else_is_answered(url: str, key: str | None, path: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Client(url, 60, key).post(path)


@pytest.mark.parametrize(
    ("key_file", "words"),
    [(None, "asks for a key; set rollout.sglang.api_key_file to the file"), ("another", "refuses the key")],
)
def test_a_run_without_the_key_is_one_sentence(
    folder: Path, url: str, key_file: str | None, words: str
) -> None:
    overrides = []
    if key_file is not None:
        (folder / key_file).write_text("wrong\n")
        (folder / key_file).chmod(0o600)
        overrides.append(f"rollout.sglang.api_key_file={folder / key_file}")
    result = train(folder, f"run_{key_file}", url, *overrides)
    assert result.returncode == 2 and result.stderr.count("error: ") == 1, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
