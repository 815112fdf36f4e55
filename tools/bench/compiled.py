"""Triton kernels compiled for an H100 without a GPU, and what the compiler reports of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

HOPPER = 90


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched."""

    kernel: Any
    types: dict[str, str]
    """Of every argument that is no constant."""
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    """num_warps, num_stages, enable_fp_fusion."""


@dataclass(frozen=True)
class Compiled:
    """The compiler's report."""

    registers: int
    """Of a thread."""
    spills: int
    """Bytes of a thread on its stack, where registers are spilled."""
    shared: int
    """Bytes of shared memory of a program."""
    threads: int
    ptx: str

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many fit into an H100's 65,536 registers, 227 KB of shared memory and 64 warps."""
        by_registers = 65536 // (-(-self.registers // 8) * 8 * self.threads)
        by_memory = 232448 // (self.shared + 1024)
        return min(by_registers, by_memory, 2048 // self.threads, 32)


def compile_for_hopper(case: Case) -> Compiled:
    """Compile as the launcher does for pointers aligned to 16 bytes."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types[name] for name in names}
    pointers = (i for i, name in enumerate(names) if signature[name].startswith("*"))
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = triton.compiler.ASTSource(case.kernel, signature, case.constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", HOPPER, 32)
    compiled = triton.compile(source, target=target, options=case.options)
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(
        registers, spills, compiled.metadata.shared, 32 * compiled.metadata.num_warps, compiled.asm["ptx"]
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes on the stack, of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", report), re.search(r"STACK:(\d+)", report)
    assert registers and stack, report
    return int(registers[1]), int(stack[1])
