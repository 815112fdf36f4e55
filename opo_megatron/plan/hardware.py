"""The constants of the planner's models of time and memory, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from opo_megatron.errors import UserError

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    bf16: float
    """Dense FLOP/s in bf16."""
    fp8: float
    """Dense FLOP/s in FP8."""


GPUS = {
    "h100": Gpu("h100", 80e9, 3.35e12, 989.4e12, 1978.9e12),
    "h200": Gpu("h200", 141e9, 4.8e12, 989.4e12, 1978.9e12),
}
"""Source: NVIDIA's data sheets for H100 SXM and H200 SXM, without sparsity."""


class Constant(NamedTuple):
    """A number with its unit and source."""

    value: float
    unit: str
    source: str


CONSTANTS = {
    "training_efficiency": Constant(
        0.48,
        "of the dense peak",
        "Megatron-LM's README: 41 to 48 % of the peak on H100s; the highest: communication is counted apart",
    ),
    "exposed": Constant(0.5, "of the policy's communication", "assumed: computation hides half"),
    "memory_efficiency": Constant(
        3.0 / 3.35, "of the data sheet", "3.0 TB/s measured on an H100 with 3.35 in its data sheet"
    ),
    "nvlink": Constant(450e9, "bytes/s", "data sheet of H100 SXM: 900 GB/s, both directions together"),
    "network": Constant(50e9, "bytes/s", "DGX H100: one 400 Gbit/s adapter per GPU"),
    "link_efficiency": Constant(0.8, "of the data sheet", "assumed: usual bus bandwidth of large NCCL calls"),
    "host_link": Constant(50e9, "bytes/s", "PCIe 5.0 x16: 64 GB/s each way; pinned copies 50 (assumed)"),
    "host_memory": Constant(
        614e9 / 8,
        "bytes/s per GPU",
        "DGX H100: two Xeon 8480C of 8 channels DDR5-4800 each, shared by 8 GPUs",
    ),
    "decode_launch": Constant(
        10e-6, "s per layer and tensor-parallel all-reduce", "assumed: latency of small NCCL calls in a node"
    ),
    "decode_step": Constant(
        1e-3, "s per decoding step", "assumed: launching a CUDA graph, sampling and scheduling beside it"
    ),
    "exchange": Constant(
        0.036,
        "s per rank of the run",
        "tools/bench_all_else.py: samples, statistics and outcomes exchanged with one other rank over gloo",
    ),
    "reward": Constant(
        1e-6, "s per response token of a rank", "tools/bench_all_else.py: the math verifier on one core"
    ),
    "bucket_latency": Constant(
        16e-3, "s per bucket", "SGLang's update of a tiny bucket took 9 to 16 ms on a CPU; the maximum"
    ),
    "step_overhead": Constant(
        1.55,
        "times what is counted",
        "fitted (tools/bench_plan.py) to one published run: Llama-3.1-8B, 16 H100s, 1,581 tokens/s/GPU",
    ),
    "reserved": Constant(
        4e9, "bytes", "assumed: CUDA contexts of two processes, NCCL's buffers, fragmentation"
    ),
    "engine_working_tokens": Constant(
        8192, "tokens × 1.5 MiB", "SGLang 0.5.21, memory_hook.py: what it reserves beside weights and cache"
    ),
    "mean_response": Constant(
        0.5, "of the longest", "assumed without --mean-response; exponential lengths, see lengths.py"
    ),
}
"""All that is modelled, not counted."""


def constant(name: str) -> float:
    return CONSTANTS[name].value


def gpu_of(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        UserError: for a name that is not in `GPUS`.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name.lower()]
