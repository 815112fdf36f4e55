"""Triton kernels: against torch references in Triton's interpreter, and compiled for H100 without a GPU."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from opo_megatron import kernels
from opo_megatron.algorithm.on_policy import HISTOGRAM
from opo_megatron.kernels import triton_advantages as group_advantages
from opo_megatron.kernels import triton_softmax as head_softmax
from opo_megatron.kernels import triton_token_loss as token_loss

INTERPRETED = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def test_kernels_equal_their_references_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_run_on_gpus_and_their_references_elsewhere() -> None:
    assert kernels.uses_triton(torch.device("cuda", 1))
    assert not kernels.uses_triton(torch.device("cpu")) and not kernels.uses_triton(torch.device("meta"))


GROUP_ADVANTAGES = {
    "rewards": "*fp64", "weights": "*fp64", "offsets": "*i64",
    "baselines": "*fp64", "advantages": "*fp64", "epsilon": "fp32",
}  # fmt: skip
TOKEN_LOSS = {
    "log_prob": "*fp32", "advantages": "*fp32", "engine_log_prob": "*fp32", "edges": "*fp32",
    "loss": "*fp32", "coefficient": "*fp32", "partial": "*fp64", "tokens": "i32",
    "inverse_normalizer": "fp32", "cap": "fp32",
}  # fmt: skip
LOGITS = {
    "targets": "*i64", "rows": "i32", "stride": "i32", "start": "i32", "inverse_temperature": "fp32",
}  # fmt: skip
HEAD = {
    "head_statistics": (head_softmax._statistics_kernel, {"statistics": "*fp32", "tokens": "i32"}),
    "head_gradient": (
        head_softmax._gradient_kernel,
        {"highest": "*fp32", "total": "*fp32", "d_log_prob": "*fp32"},
    ),
}


def combinations(*flags: str) -> list[dict[str, bool]]:
    """All combinations of these boolean constants."""
    values_of_all = itertools.product((False, True), repeat=len(flags))
    return [dict(zip(flags, values, strict=True)) for values in values_of_all]


CASES: dict[str, list[tuple[Any, dict[str, str], dict[str, Any], int]]] = {
    "group_advantages": [
        (
            group_advantages._kernel,
            GROUP_ADVANTAGES,
            flags | {"BLOCK": group_advantages.BLOCK},
            4,
        )
        for flags in combinations("LEAVE_ONE_OUT", "SCALE")
    ],
    "token_loss": [
        (
            token_loss._kernel,
            TOKEN_LOSS,
            flags | {"EDGES": len(HISTOGRAM) * flags["MEASURES"], "BLOCK": token_loss.BLOCK},
            4,
        )
        for flags in combinations("HAS_LOSS", "CAPPED", "MEASURES")
        if flags["HAS_LOSS"] or (flags["MEASURES"] and not flags["CAPPED"])
    ],
}
"""Kernel, argument types, constants, warps."""
BLOCKS = {
    "head_statistics": {"BLOCK": head_softmax.BLOCK, "GROUP": head_softmax.GROUP},
    "head_gradient": {"BLOCK": head_softmax.BLOCK},
}
CASES |= {
    name: [
        (kernel, types | LOGITS | {"logits": logits}, BLOCKS[name], head_softmax.WARPS)
        for logits in ("*fp32", "*bf16")
    ]
    for name, (kernel, types) in HEAD.items()
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_for_hopper(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    for kernel, pointers, constants, warps in CASES[name]:
        types = pointers | dict.fromkeys(constants, "constexpr")
        signature = {argument: types[argument] for argument in kernel.arg_names}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
        assert ".target sm_90" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 0
        assert compiled.metadata.shared <= 48 * 1024


@pytest.mark.parametrize(
    ("name", "most", "double"),
    [("token_loss", 110, range(4, 19)), ("head_statistics", 28, (0,)), ("head_gradient", 21, (0,))],
)
def test_kernels_need_few_enough_instructions_to_be_memory_bound(
    name: str, most: int, double: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H100 moves a byte in the time of about ten instructions of one thread, of which double precision
    takes two each: 20 bytes a token, 2 and 4 a logit.  What precedes and follows a loop over blocks is
    counted as if it ran for every block: 13 of the 26 of `head_statistics`."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps = CASES[name][-1]  # with all flags; logits in bf16
    operations = [line.split(".")[0] for line in sass(kernel, types, constants, warps)]
    elements = constants["BLOCK"] // (warps * 32)
    in_double = sum(operation in ("DADD", "DMUL", "DFMA", "DSETP") for operation in operations)
    assert in_double // elements in double
    assert len(operations) / elements <= most


def sass(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> list[str]:
    """The machine instructions for aligned arguments, as the launcher compiles them for aligned tensors."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    integers = ("tokens", "rows", "stride")
    is_aligned = [name in integers or signature[name].startswith("*") for name in names]
    attributes = {(i,): [["tt.divisibility", 16]] for i, aligned in enumerate(is_aligned) if aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]*)", text, re.M)
