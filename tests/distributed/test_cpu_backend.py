"""The CPU backend covers every use of CUDA in Megatron-Core; uses added by an upgrade fail here."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import types
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from opo_megatron.distributed.cpu_backend import (
    LITERAL_MODULES,
    PATCHED_CUDA_NAMES,
    install,
    module_functions,
)

EXEMPT_LITERALS = {
    "tensor_parallel/layers.py": (2, "decorators of autocast, without effect outside autocast"),
    "tensor_parallel/random.py": (4, "the random-state functions, which are replaced"),
}
"""Used modules that name CUDA in a string: how often, and why that is harmless."""

EXEMPT_NAMES = {
    "nvtx": "profiling ranges, off by config",
    "is_available": "a check before use",
    "device_count": "a check before use",
    "FloatTensor": "listed with the CPU type of the same name",
    "HalfTensor": "listed with the CPU type of the same name",
    "BFloat16Tensor": "listed with the CPU type of the same name",
    "OutOfMemoryError": "an exception type",
    "temperature": "straggler detector, not started by the project",
    "power_draw": "straggler detector, not started by the project",
    "utilization": "straggler detector, not started by the project",
    "clock_rate": "straggler detector, not started by the project",
    "default_generators": "inside the random-state functions that are replaced",
    "CUDAGraph": "only with CUDA graphs",
    "graph": "only with CUDA graphs",
    "MemPool": "only with NCCL user buffers",
    "memory_stats": "only with graphs or offloading",
    "empty_cache": "does nothing before CUDA is initialised",
    "amp": "decorators of autocast, without effect outside autocast",
    "random": "inside the random-state functions that are replaced",
    "is_current_stream_capturing": "only with CUDA graphs",
    "get_device_capability": "a check of the dispatcher of NCCL, of which alltoall makes no use",
}
"""Attributes of torch.cuda that used Megatron modules may access, and why."""


def used_modules() -> dict[str, Path]:
    """Megatron modules that the project uses: path below megatron/core → file."""
    root = Path(importlib.util.find_spec("megatron").submodule_search_locations[0]) / "core"
    folders = ("distributed", "models/common", "models/gpt", "optimizer", "pipeline_parallel",
               "tensor_parallel", "transformer", "fusions")  # fmt: skip
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    files += [root / "utils.py", root / "parallel_state.py"]
    return {str(path.relative_to(root)): path for path in files if not _is_unused(path)}


def _is_unused(path: Path) -> bool:
    """Features that the project does not use: FSDP, offloading, CUDA graphs, fused GPU code, other models."""
    parts = ("fsdp", "fully_sharded", "offload", "cuda_graph", "fused_indices", "batch_invariant",
             "hybrid_cp", "combined_1f1b", "multi_latent", "experimental", "fine_grained", "layer_wise",
             "muon", "fused_a2a", "qk_clip", "bridge_communicator", "multi_token_prediction",
             "heterogeneous", "inference", "paged_stash")  # fmt: skip
    return any(part in str(path) for part in parts)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    install("cpu")


def names_cuda(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"cuda(:\d*)?|torch\.cuda\.\w+Tensor", value) is not None


def literals_of(path: Path) -> int:
    """Number of strings in a source file that name CUDA, f-strings included, docstrings not."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return sum(isinstance(node, ast.Constant) and names_cuda(node.value) for node in nodes)


def test_every_string_that_names_cuda_is_rewritten_or_exempt() -> None:
    unknown = {}
    for name, path in used_modules().items():
        module = "megatron.core." + name.removesuffix(".py").replace("/", ".")
        count, exempt = literals_of(path), EXEMPT_LITERALS.get(name, (0, ""))[0]
        if module not in LITERAL_MODULES and count != exempt:
            unknown[name] = count
    assert not unknown, f"neither in LITERAL_MODULES nor exempt: {unknown}"


def test_rewritten_modules_name_cuda_in_no_executed_code() -> None:
    """Neither in a function's code or defaults, nor at module level, where nothing is rewritten."""

    def constants(code: types.CodeType) -> set[object]:
        nested = [constants(c) for c in code.co_consts if isinstance(c, types.CodeType)]
        return set(code.co_consts).union(*nested)

    for name in LITERAL_MODULES:
        module = importlib.import_module(name)
        functions = module_functions(module)
        assert functions
        for function in functions:
            used = constants(function.__code__) - {function.__doc__}
            defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
            wrong = [value for value in (*used, *defaults) if names_cuda(value)]
            assert not wrong, f"{name}.{function.__qualname__}: {wrong}"
        assert not [k for k, v in vars(module).items() if names_cuda(v)], name


def test_every_use_of_torch_cuda_is_replaced_or_exempt() -> None:
    unknown: dict[str, list[str]] = {}
    for name, path in used_modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                allowed = PATCHED_CUDA_NAMES | EXEMPT_NAMES.keys()
                if node.attr not in allowed:
                    unknown.setdefault(node.attr, []).append(f"{name}:{node.lineno}")
    assert not unknown, f"neither replaced nor exempt: {unknown}"


def test_a_process_installs_one_device_only() -> None:
    install("cpu")
    with pytest.raises(RuntimeError, match="already runs on 'cpu'"):
        install("meta")


def test_a_cuda_compiler_without_a_gpu_gives_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """CUDA builds of torch warn of it when Megatron is imported."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cpp_extension.logger, "propagate", True)  # so that caplog sees it
    assert cpp_extension._find_cuda_home() == str(tmp_path)
    assert caplog.records == []
    cpp_extension.logger.warning("anything else")
    assert len(caplog.records) == 1
