"""The CPU backend covers what Megatron-Core names CUDA for, and says so when an upgrade adds more."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import types
from pathlib import Path

import pytest

from opo_megatron.policy.cpu_backend import (
    LITERAL_MODULES,
    PATCHED_CUDA_NAMES,
    install,
    literal_map,
    module_functions,
)

EXEMPT_LITERALS = {
    "pipeline_parallel/utils.py": "names a CUDA stream's device; streams are replaced",
    "tensor_parallel/layers.py": "decorators of autocast, without effect outside autocast",
    "tensor_parallel/random.py": "defaults of the two random-state functions that are replaced",
    "transformer/moe/token_dispatcher.py": "device of permute fusion, which needs Transformer Engine",
}
"""Modules on the project's path that may name CUDA in a string, and why that does no harm."""

EXEMPT_NAMES = {
    "nvtx": "profiling ranges, off by config",
    "is_available": "asks before it uses",
    "device_count": "asks before it uses",
    "FloatTensor": "listed beside the CPU type of the same name",
    "HalfTensor": "listed beside the CPU type of the same name",
    "BFloat16Tensor": "listed beside the CPU type of the same name",
    "OutOfMemoryError": "an exception type",
    "temperature": "straggler detector, which the project does not start",
    "power_draw": "straggler detector, which the project does not start",
    "utilization": "straggler detector, which the project does not start",
    "clock_rate": "straggler detector, which the project does not start",
    "default_generators": "inside the random-state functions that are replaced",
    "CUDAGraph": "only with CUDA graphs",
    "graph": "only with CUDA graphs",
    "MemPool": "only with NCCL user buffers",
    "memory_stats": "only with graphs or offloading",
    "empty_cache": "does nothing before CUDA is initialised",
    "amp": "decorators of autocast, without effect outside autocast",
    "random": "inside the random-state functions that are replaced",
}
"""Attributes of torch.cuda that Megatron's modules on the project's path may use, and why."""


def used_modules() -> dict[str, Path]:
    """Megatron modules that the project's own code runs through: path below megatron/core → file."""
    root = Path(importlib.util.find_spec("megatron").submodule_search_locations[0]) / "core"
    folders = ("distributed", "models/common", "models/gpt", "optimizer", "pipeline_parallel",
               "tensor_parallel", "transformer", "fusions")  # fmt: skip
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    files += [root / "utils.py", root / "parallel_state.py"]
    return {str(path.relative_to(root)): path for path in files if not _is_elsewhere(path)}


def _is_elsewhere(path: Path) -> bool:
    """Parts that the project never enters: FSDP, offloading, CUDA graphs, fused GPU code, other models."""
    parts = ("fsdp", "fully_sharded", "offload", "cuda_graph", "fused_indices", "batch_invariant",
             "hybrid_cp", "combined_1f1b", "multi_latent", "experimental", "fine_grained", "layer_wise",
             "muon", "fused_a2a", "qk_clip", "bridge_communicator", "multi_token_prediction",
             "heterogeneous", "inference")  # fmt: skip
    return any(part in str(path) for part in parts)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    install("cpu")


def test_every_string_that_names_cuda_is_rewritten_or_known_to_be_harmless() -> None:
    literals, found = set(literal_map("cpu")), {}
    for name, path in used_modules().items():
        tree = ast.parse(path.read_text())
        lines = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in literals]
        module = "megatron.core." + name.removesuffix(".py").replace("/", ".")
        if lines and module not in LITERAL_MODULES and name not in EXEMPT_LITERALS:
            found[name] = lines
    assert not found, f"not covered by LITERAL_MODULES: {found}"


def test_rewritten_functions_name_cuda_nowhere() -> None:
    def constants(code: types.CodeType) -> set[str]:
        nested = [constants(c) for c in code.co_consts if isinstance(c, types.CodeType)]
        return {c for c in code.co_consts if isinstance(c, str)}.union(*nested)

    literals = set(literal_map("cpu"))
    for name in LITERAL_MODULES:
        functions = module_functions(importlib.import_module(name))
        assert functions
        for function in functions:
            assert not literals & constants(function.__code__), f"{name}.{function.__qualname__}"


def test_every_use_of_torch_cuda_is_replaced_or_known_to_be_harmless() -> None:
    found: dict[str, list[str]] = {}
    for name, path in used_modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                known = PATCHED_CUDA_NAMES | EXEMPT_NAMES.keys()
                if node.attr not in known:
                    found.setdefault(node.attr, []).append(f"{name}:{node.lineno}")
    assert not found, f"neither replaced nor exempt: {found}"


def test_a_process_has_one_device() -> None:
    install("cpu")
    with pytest.raises(RuntimeError, match="already runs on 'cpu'"):
        install("meta")
