"""Stubs that a server gets where there is no GPU, whatever torch and torchvision are built for."""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from opo_megatron.rollout.sglang.installation import SERVE
from opo_megatron.rollout.sglang.server import Server
from tests.support.fixtures import small_config

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
PACKAGE = """
import contextlib, pathlib, torch
with contextlib.suppress(OSError):
    torch.ops.load_library(pathlib.Path(__file__).with_name("_C.so"))
assert torch.ops.torchvision.nms and torch.ops.torchvision.qnms
"""


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Library path of a fake torchvision, which loads it and needs its operators like the real one."""
    (tmp_path / "torchvision").mkdir()
    package = tmp_path / "torchvision" / "__init__.py"
    package.write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(sys.modules)
    yield package.with_name("_C.so")
    # transformers would take the fakes for the real packages.
    for name in ("torchvision", "vllm", "vllm._custom_ops"):
        if name in before:
            sys.modules[name] = before[name]
        else:
            sys.modules.pop(name, None)


def serve(monkeypatch: pytest.MonkeyPatch, built_for: str | None, has_gpu: bool) -> dict[str, Any]:
    """The globals of serve.py after it is run, as in a worker of SGLang."""
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    return runpy.run_path(str(SERVE))


@pytest.mark.parametrize("built_for", [None, "13.0"])
@pytest.mark.parametrize("loads", [False, True])
def test_without_a_gpu_imports_are_stubbed_for_every_torch_build(
    torchvision: Path, monkeypatch: pytest.MonkeyPatch, built_for: str | None, loads: bool
) -> None:
    """`loads`: torchvision's own library loads, and its operators must not be defined twice."""
    torchvision_library, loaded = torch.library.Library("torchvision", "FRAGMENT"), []

    def load_library(path: Path) -> None:
        assert path == torchvision
        if not loads:
            raise OSError("libtorch_cuda.so: cannot open shared object file")
        if not loaded:
            for operator in ("nms", "qnms"):
                torchvision_library.define(operator + SCHEMA)
        loaded.append(path)

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    module = serve(monkeypatch, built_for, has_gpu=False)
    try:
        importlib.import_module("torchvision")
        operators = importlib.import_module("vllm._custom_ops")
        with pytest.raises(RuntimeError, match="has no CPU kernel"):
            operators.rms_norm()
    finally:
        torchvision_library._destroy()
        if library := getattr(module["stub_cpu_imports"], "library", None):
            library._destroy()


@pytest.mark.parametrize("built_for", [None, "13.0"])
def test_with_a_gpu_nothing_is_stubbed(
    torchvision: Path, monkeypatch: pytest.MonkeyPatch, built_for: str | None
) -> None:
    module = serve(monkeypatch, built_for, has_gpu=True)
    assert "vllm" not in sys.modules and not hasattr(module["stub_cpu_imports"], "library")


def test_a_server_on_the_cpu_sees_no_gpu(tmp_path: Path) -> None:
    """SGLang checks torch for a GPU, not its own option `--device cpu`."""
    config = small_config("rollout.engine=sglang", f"run.dir={tmp_path / 'run'}")
    visible_devices = [
        Server(config, tmp_path, tmp_path / "log", "server", gpus).environment()["CUDA_VISIBLE_DEVICES"]
        for gpus in (None, ["2", "3"])
    ]
    assert visible_devices == ["", "2,3"]


CHILD = """
import runpy, sys, time, types
cuda = types.SimpleNamespace(is_available=lambda: True)  # needs no stubs
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
serve = runpy.run_path(sys.argv[1])
serve["die_with_trainer"]()
print("lives", flush=True)
time.sleep(60)
"""
PARENT_PROGRAM = """
import os, subprocess, sys
program, serve, trainer = sys.argv[1:]
named = {"OPO_TRAINER_PID": trainer.replace("own", str(os.getpid()))} if trainer else {}
argv, pipe = [sys.executable, "-c", program, serve], subprocess.PIPE
child = subprocess.Popen(argv, env=os.environ | named, stdout=pipe, stderr=pipe, text=True)
line = child.stdout.readline() or child.communicate()[1]
print(child.pid, line.strip(), flush=True)
"""


@pytest.mark.parametrize(
    ("trainer", "line", "outlives"),
    [
        ("own", "lives", False),
        ("", "lives", True),  # `opo serve` in the background, whose shell ends
        ("1", "the trainer that started this server is gone", False),
        ("999999999", "the trainer that started this server is gone", False),
    ],
)
def test_a_server_ends_with_its_trainer_and_with_no_other_process(
    trainer: str, line: str, outlives: bool
) -> None:
    argv = [sys.executable, "-c", PARENT_PROGRAM, CHILD, str(SERVE), trainer]
    result = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=100, check=True)
    pid, _, said = result.stdout.strip().partition(" ")
    assert said.strip() == line
    deadline = time.monotonic() + 10
    while (lives := psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != "zombie") and (
        not outlives and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert lives == outlives
    if outlives:
        os.kill(int(pid), signal.SIGKILL)


def test_every_start_of_every_server_has_random_numbers_of_its_own(tmp_path: Path) -> None:
    def seeds(run_seed: int, name: str) -> list[str]:
        server = Server(small_config(f"run.seed={run_seed}"), tmp_path, tmp_path / "log", name, None)
        found = []
        for start in range(3):
            server._starts = start
            words = server.arguments(1)
            found.append(words[words.index("--random-seed") + 1])
        return found

    runs = [(1, "server_0"), (1, "server_8"), (2, "server_0"), (1, "10.0.0.1:30000"), (1, "10.0.0.1:30001")]
    all_seeds = [seed for one in runs for seed in seeds(*one)]
    assert len({*all_seeds}) == len(all_seeds) == 15 and all(0 <= int(seed) < 2**31 for seed in all_seeds)
    assert seeds(1, "server_0") == seeds(1, "server_0")
