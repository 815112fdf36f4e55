"""Triton kernels: in Triton's interpreter against their torch twins, and compiled for H100 without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from opo_megatron.kernels import group_advantages

INTERPRETED = Path(__file__).parent / "interpreted_kernels.py"


def test_kernels_equal_their_twins_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


KERNELS = {"group_advantages": group_advantages._kernel}
POINTERS = {
    "group_advantages": {
        "rewards": "*fp64", "weights": "*fp64", "offsets": "*i64", "token_offsets": "*i64",
        "baselines": "*fp64", "advantages": "*fp64", "token_advantages": "*fp32", "epsilon": "fp32",
    },
}  # fmt: skip
CONSTANTS = {
    "group_advantages": [
        {
            "LEAVE_ONE_OUT": loo, "SCALE": scale, "SPREAD": True,
            "BLOCK": group_advantages.BLOCK, "TOKEN_BLOCK": group_advantages.TOKEN_BLOCK,
            "SLICE": group_advantages.SLICE,
        }
        for loo in (False, True)
        for scale in (False, True)
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", POINTERS)
def test_kernels_compile_for_hopper(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, target = KERNELS[name], triton.backends.compiler.GPUTarget("cuda", 90, 32)
    for constants in CONSTANTS[name]:
        signature = POINTERS[name] | dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=target, options={"num_warps": 4})
        assert ".target sm_90" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 0
