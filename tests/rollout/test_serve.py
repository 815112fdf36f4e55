"""Stubs that a server gets where there is no GPU, whatever torch and torchvision are built for."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
