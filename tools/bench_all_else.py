"""Measures what a step does besides generation, sync and training, at the counts of the 70B recipe
→ records/all_else.json

    python tools/bench_all_else.py --against COMMIT    # before and after; a minute on two cores
    python tools/bench_all_else.py --no-record

1,024 responses of 4,096 tokens over 64 ranks: every rank here has the 16 responses of one of them, and sends
the 8 that a replica trains on to each of its ranks, so that all messages between two ranks have their true
sizes.  Measured alone and with 2 ranks of one replica over gloo, each on a core; what grows with the ranks
is extended to 64 by the difference, per message: an upper bound, because messages to several ranks overlap
there.  Rank 0's file of the rollouts is measured with all 1,024.  The digest of the weights is memory-bound
on a GPU: the bytes that its operations read and write per element are counted, for the elements of a rank of
the recipe (`opo plan`).  `before` is the same of a commit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench.record import write_record
from compare_commits import checkout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opo_megatron.audit.digest import Positions, digest_shard
from opo_megatron.audit.record import digest_rollouts
from opo_megatron.batch.micro_batch import schedule_micro_batches
from opo_megatron.batch.redistribute import gather_to_rank0, send_to_dp
from opo_megatron.batch.rollouts import FINISH_STOP, Rollouts
from opo_megatron.batch.stats import gather_stats
from opo_megatron.config import load_config
from opo_megatron.distributed.launch import run_ranks
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    initialize,
    rank_range,
    shutdown,
)
from opo_megatron.observe.metrics_file import MetricsFile
from opo_megatron.plan.hardware import GPUS, constant
from opo_megatron.tasks.math_answers import grade
from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
RANKS, REPLICAS, PER_RANK, GROUP, PROMPT, RESPONSE = 64, 2, 16, 8, 512, 4096
ELEMENTS = 70_553_706_496 // (8 * 4 * REPLICAS)
"""Of the weights, that a rank of the recipe digests: TP 8, PP 4, replicas take turns."""
COLLECTIVES = 16
"""Small exchanges among all ranks in a step: outcomes of generation, sync and probe, statistics, versions,
digests, failures, whether to save or to stop."""
EXCHANGES = ("exchange of samples", "statistics", "small exchanges", "samples to rank 0")
DIGEST = "digest of the weights"
ROUNDS = 9


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit too")
    parser.add_argument("--rank", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        measure_rank(Path(options.rank))
        return 0
    results: dict[str, Any] = {"now": measured(ROOT)}
    if options.against is not None:
        with checkout(options.against) as before:
            results = {"against": options.against, "before": measured(before), **results}
    print(json.dumps(results, indent=2))
    if not options.no_record:
        print(f"written to {write_record('all_else', results)}")
    return 0


def measured(tree: Path) -> dict[str, Any]:
    """All parts, with the package of a tree.

    Raises:
        SystemExit: where a rank fails.
    """
    by_ranks = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, 2):
            file = Path(folder) / f"{ranks}.json"
            command = ["env", f"PYTHONPATH={tree}", sys.executable, __file__, "--rank", str(file)]
            if code := run_ranks(command, ranks):
                sys.exit(code)
            by_ranks[ranks] = json.loads(file.read_text())
    return summarize(by_ranks)


def summarize(by_ranks: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Seconds at 64 ranks: what is exchanged by the message, the rest as measured."""
    alone, two = by_ranks[1], by_ranks[2]
    results: dict[str, Any] = {}
    for name in [name for name in two if name != DIGEST]:
        message = max(0.0, two[name] - alone[name]) if name in EXCHANGES else 0.0
        results[f"{name}, s"] = two[name] + message * (RANKS - 2)
    results["digest of the weights, s"] = alone[DIGEST]
    results["sum, s"] = sum(value for name, value in results.items() if name.endswith(", s"))
    return results | {"measured with 1 and 2 ranks": by_ranks}


def samples(first: int, count: int, per_prompt: int = GROUP) -> Rollouts:
    """`count` samples of the step, from number `first` on."""
    generator = torch.Generator().manual_seed(first)
    numbers = torch.arange(first, first + count)
    return Rollouts(
        prompt_ids=numbers // per_prompt,
        groups=numbers // per_prompt,
        sample_indices=numbers % per_prompt,
        prompt_lengths=torch.full((count,), PROMPT),
        prompt_tokens=torch.randint(128256, (count * PROMPT,), generator=generator),
        response_lengths=torch.full((count,), RESPONSE),
        response_tokens=torch.randint(128256, (count * RESPONSE,), generator=generator),
        finish_reasons=torch.full((count,), FINISH_STOP),
        weight_versions=torch.zeros(count * RESPONSE, dtype=torch.int64),
        engine_log_prob=torch.randn(count * RESPONSE, generator=generator),
        rewards=torch.randint(2, (count,), generator=generator).double(),
    )


def solution(number: int) -> str:
    """A response of about 4,096 tokens of text, with an answer."""
    words = random.Random(number).choices(["so", "therefore", "x^2", r"\frac{1}{2}", "we", "find"], k=3500)
    return " ".join(words) + rf" \boxed{{{number}}}"


def measure_rank(file: Path) -> None:
    """All parts on this rank; rank 0 writes the medians."""
    world = int(os.environ["WORLD_SIZE"])
    one_replica = ["policy.device=cpu", f"policy.tensor_model_parallel_size={world}"]
    config = load_config(ROOT / "recipes" / "quickstart.yaml", one_replica, world)
    parallel = initialize(config)
    try:
        parts = {name: timed(parallel, fn) for name, fn in parts_of(parallel, file.parent).items()}
        if parallel.rank == 0:
            file.write_text(json.dumps(parts | {DIGEST: digest_of_weights()}))
    finally:
        shutdown()


def parts_of(parallel: Parallel, folder: Path) -> dict[str, Callable[[], object]]:
    """Name → what this rank does in a step."""
    world = parallel.world_size
    own = samples(parallel.rank * PER_RANK, PER_RANK)
    sent = own.select(list(range(PER_RANK // REPLICAS)))
    total = world * len(sent)
    held = [list(rank_range(total, rank, world)) for rank in range(world)]
    schedule = schedule_micro_batches([PROMPT + RESPONSE] * total, 1, 2 * (PROMPT + RESPONSE), packed=True)
    texts = [solution(number) for number in range(PER_RANK)]
    everything = samples(0, RANKS * PER_RANK) if parallel.rank == 0 else None
    metrics = MetricsFile(folder / f"metrics_{world}.jsonl") if parallel.rank == 0 else None

    def small_exchanges() -> None:
        for _ in range(COLLECTIVES):
            all_gather_objects(parallel, (None, None))

    def write() -> None:
        if everything is not None:
            everything.save(folder / "rollouts.safetensors")

    def write_metrics() -> None:
        if metrics is not None:
            metrics.append({f"group/metric_{i}": 0.5 for i in range(120)})

    return {
        "rewards": lambda: [grade(text, str(number)) for number, text in enumerate(texts)],
        "exchange of samples": lambda: send_to_dp(parallel, sent, schedule, held),
        "statistics": lambda: gather_stats(parallel, own),
        "small exchanges": small_exchanges,
        "digests of the samples": lambda: digest_rollouts(parallel, own),
        "samples to rank 0": lambda: gather_to_rank0(parallel, own),
        "file of the samples": write,
        "metrics": write_metrics,
    }


def timed(parallel: Parallel, fn: Callable[[], object]) -> float:
    """The slowest rank's median."""
    seconds = []
    for _ in range(ROUNDS):
        all_gather_objects(parallel, None)
        began = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - began)
    return max(all_gather_objects(parallel, median(seconds)))


class _Bytes(TorchDispatchMode):
    """Bytes that operations read and write."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [one for one in tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
            self.total += sum(one.numel() * one.element_size() for one in tensors)
        return result


def digest_of_weights() -> float:
    """Seconds on an H100: bytes per element of a bf16 matrix, at its memory bandwidth."""
    shape, count = (1024, 1024), 2**20
    values = torch.randn(shape, dtype=torch.bfloat16)
    with _Bytes() as counted:
        positions = Positions(shape, 0, torch.device("cpu"))[:]
        digest_shard(values, positions, ["model.layers.0.mlp.down_proj.weight"])
    bandwidth = GPUS["h100"].bandwidth * constant("memory_efficiency")
    return counted.total / count * ELEMENTS / bandwidth


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
