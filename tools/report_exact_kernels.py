"""Compiles exact mode's Triton kernels for an H100, without a GPU → records/exact_kernels.json

    python tools/report_exact_kernels.py            # in bf16; --dtype fp32 writes nothing

Of each kernel, for the sizes of an 8B model: registers, bytes spilled, shared memory, programs that fit into
a multiprocessor, and the floor of a launch: the bytes that it at least moves at 3.35 TB/s, and the operations
that it computes at 989 TFLOP/s on tensor cores, or 67 elsewhere.  No time is measured.  Exit code 1 where a
kernel spills registers.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from bench.compiled import compile_for_hopper
from bench.exact_cases import Counted, cases
from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

BYTES_PER_SECOND, TENSOR_OPERATIONS, OPERATIONS = 3.35e12, 989e12, 67e12


def figures(counted: Counted) -> dict[str, Any]:
    """One kernel's entry of the record."""
    compiled = compile_for_hopper(counted.case)
    on_tensor_cores = "mma" in compiled.ptx
    memory = counted.bytes / BYTES_PER_SECOND
    compute = counted.operations / (TENSOR_OPERATIONS if on_tensor_cores else OPERATIONS)
    return {
        "registers": compiled.registers,
        "spilled_bytes": compiled.spills,
        "shared_bytes": compiled.shared,
        "programs_per_multiprocessor": compiled.programs_per_multiprocessor,
        "tensor_cores": on_tensor_cores,
        "bytes": counted.bytes,
        "operations": counted.operations,
        "floor_us": round(1e6 * max(memory, compute), 1),
        "bound_by": "memory" if memory > compute else "operations",
    }


def main() -> int:
    prepare_terminal()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    results = {}
    for name, counted in cases(arguments.dtype).items():
        results[name] = entry = figures(counted)
        print(
            f"{name:42} {entry['registers']:3} registers, {entry['spilled_bytes']} bytes spilled, "
            f"{entry['shared_bytes'] / 1024:.0f} KB shared, "
            f"floor {entry['floor_us']} us by {entry['bound_by']}"
        )
    if arguments.dtype == "bf16":
        print(write_record("exact_kernels", results))
    return int(any(entry["spilled_bytes"] for entry in results.values()))


if __name__ == "__main__":
    sys.exit(main())
