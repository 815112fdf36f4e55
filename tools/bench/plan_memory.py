"""Compares the memory that `opo plan` predicts with what CPU ranks allocate.

A small model takes two whole steps on CPU ranks.  After every torch operation glibc's allocator reports the
allocated bytes; their maximum, minus those before the policy was built, is compared with the planner's count,
for each rank of each layout.  torch's profiler does not work here: gloo's threads free many buffers of
collectives, and it does not see them.  On a CPU the attention is Megatron's local one, so the planner counts
that.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any, ClassVar

SAMPLE = (16, 48)
"""Prompt and response tokens of each sample."""
VOCAB_SIZE = 512
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "DP2": (2, ()),
    "TP2 SP": (2, ("tensor_model_parallel_size=2", "sequence_parallel=true")),
    "PP2": (2, ("pipeline_model_parallel_size=2",)),
    "PP2 VPP2": (2, ("pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2")),
    "TP2 PP2": (4, ("tensor_model_parallel_size=2", "pipeline_model_parallel_size=2")),
}
"""Ranks and keys of `policy`."""
_MODEL = (
    "warm_start.steps=0",
    "policy.model.num_layers=4",
    "policy.model.hidden_size=128",
    "policy.model.ffn_hidden_size=352",
    "policy.model.num_query_groups=2",
    f"policy.model.vocab_size={VOCAB_SIZE}",
    "policy.max_tokens_per_micro_batch=4096",
    "policy.device=cpu",
)
_RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def config_of(layout: str) -> Any:
    from opo_megatron.config import load_config

    ranks, keys = LAYOUTS[layout]
    return load_config(_RECIPE, ["run.dir=unused", *_MODEL, *(f"policy.{key}" for key in keys)], ranks)


def samples_of(config: Any, ranks: int) -> list[tuple[int, int]]:
    """Four full micro-batches for each data-parallel rank."""
    from opo_megatron.config.arithmetic import model_parallel_size

    rows = config.policy.max_tokens_per_micro_batch // sum(SAMPLE)
    return [SAMPLE] * (4 * rows * (ranks // model_parallel_size(config.policy)))


def predicted(layout: str) -> list[int]:
    """Bytes at the peak of a step, by rank, as the planner counts them."""
    from opo_megatron.plan.activations import activation_peak, optimizer_step_peak
    from opo_megatron.plan.ranks import fake_rank, meta_policy, rank_bytes, use_meta_device

    use_meta_device()
    config, ranks = config_of(layout), LAYOUTS[layout][0]
    peaks = []
    for rank in range(ranks):
        with fake_rank(config, rank, ranks) as parallel:
            policy = meta_policy(config, VOCAB_SIZE, parallel)
            static = rank_bytes(policy).static
            step = activation_peak(policy, samples_of(config, ranks), on_gpus=False)
            peaks.append(static + max(step, optimizer_step_peak(policy)))
    return peaks


def measured(layout: str, folder: Path) -> list[int]:
    """The same, measured on CPU ranks."""
    from opo_megatron.distributed.launch import run_ranks

    ranks = LAYOUTS[layout][0]
    code = run_ranks([sys.executable, "-W", "ignore", __file__, layout, str(folder)], ranks)
    if code != 0:
        raise RuntimeError(f"ranks of {layout} failed with exit code {code}")
    return [int(json.loads((folder / f"{rank}.json").read_text())) for rank in range(ranks)]


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_: ClassVar = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")),
        *((name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def make_heap_monitor() -> Any:
    """Tracks the maximum of glibc's allocated bytes, sampled after every torch operation."""
    from torch.utils._python_dispatch import TorchDispatchMode

    library = ctypes.CDLL("libc.so.6")
    library.mallinfo2.restype = _Heap

    def allocated() -> int:
        heap = library.mallinfo2()
        return int(heap.uordblks + heap.hblkhd)

    class HeapMonitor(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.peak = allocated(), 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.peak = max(self.peak, allocated() - self.start)
            return result

    return HeapMonitor()


def measure_here(layout: str, folder: Path) -> None:
    """In one rank: two steps."""
    import torch

    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.batch.rollouts import Rollouts
    from opo_megatron.distributed.process_groups import initialize, shutdown
    from opo_megatron.policy.policy import Policy

    config = config_of(layout)
    parallel = initialize(config)
    samples = samples_of(config, parallel.world_size)
    rollouts = Rollouts.from_demonstrations([[1] * p for p, _ in samples], [[2] * r for _, r in samples])
    rollouts.is_demonstration = False
    rollouts.advantages = torch.ones(len(samples), dtype=torch.float64)
    with make_heap_monitor() as monitor:
        policy = Policy(config, VOCAB_SIZE, parallel, config.optimizer, weights=None)
        for chunk in policy.chunks:
            for weight in chunk.parameters():
                weight.data.fill_(0.01)
        policy.start_optimizer(config.optimizer)
        schedule = policy.schedule(rollouts.sequence_lengths)
        own_rollouts = rollouts.select(schedule.samples_of(parallel.dp_rank))
        for _ in range(2):
            policy.train_step(own_rollouts, schedule, PolicyGradient(1000.0, 1.0), 1e-4)
    peak = monitor.peak
    (folder / f"{parallel.rank}.json").write_text(str(peak))
    shutdown()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    measure_here(sys.argv[1], Path(sys.argv[2]))
