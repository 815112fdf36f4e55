"""Benchmarks checkpoint saving → records/checkpoint.json

    python tools/bench_checkpoint.py             # a policy of 50M parameters, 20 steps, a save every 5

Supervised steps of one process, interleaved without saves, with asynchronous saves and with synchronous
saves: seconds per step, and the slowdown as a share of the time between saves.  Then the writer's throughput:
bytes per second of one checkpoint, checksums included, against a plain write of as many bytes with fsync.
Each figure is the median over rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench.record import write_record

from opo_megatron.algorithm.objective import Supervised
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.checkpoint.progress import RunProgress
from opo_megatron.checkpoint.save import PendingCheckpoint
from opo_megatron.config import Config, load_config
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.policy.policy import Policy
from opo_megatron.utils.terminal import prepare_terminal
from opo_megatron.weights.random_init import random_weights

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
VOCAB_SIZE = 8192
MODEL = (
    "policy.model.num_layers=8",
    "policy.model.hidden_size=640",
    "policy.model.ffn_hidden_size=1760",
    "policy.model.num_attention_heads=10",
    "policy.model.max_sequence_length=512",
)
STEPS, EVERY, ROUNDS = 20, 5, 3
SEQUENCES, TOKENS = 4, 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(Path(folder), options.rounds)
    print(json.dumps(results, indent=2))
    if not options.no_record:
        print(f"written to {write_record('checkpoint', results)}")
    return 0


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    config = load_config(RECIPE, [f"run.dir={folder / 'run'}", *MODEL])
    parallel = initialize(config)
    weights = random_weights(config.policy.model, VOCAB_SIZE, 1)
    policy = Policy(config, VOCAB_SIZE, parallel, config.optimizer, weights)
    step(policy, 0)  # allocates
    modes = (None, True, False)
    seconds: dict[bool | None, list[float]] = {mode: [] for mode in modes}
    for _ in range(rounds):  # interleaved, so that other load on the machine affects all modes
        for mode in modes:
            seconds[mode].append(run(policy, config, mode))
    without, asynchronous, synchronous = (median(seconds[mode]) for mode in modes)
    between = EVERY * without
    writes = [write_one(policy, config, folder) for _ in range(rounds)]
    results = {
        "parameters": sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()),
        "steps": STEPS,
        "save every": EVERY,
        "seconds per step without saves": without,
        "seconds per step, saves beside the training": asynchronous,
        "seconds per step, saves waited for": synchronous,
        "longer by, of the time between saves (beside)": (asynchronous - without) / between,
        "longer by, of the time between saves (waited for)": (synchronous - without) / between,
        "seconds per save that training waits for (beside)": (asynchronous - without) * EVERY,
        "bytes of a checkpoint": writes[0]["bytes"],
        "MB/s of the writer, checksums included": median(one["writer"] for one in writes),
        "MB/s of a plain write": median(one["plain"] for one in writes),
        "rounds": rounds,
    }
    shutdown()
    return results


def step(policy: Policy, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCAB_SIZE, (SEQUENCES, TOKENS), generator=generator).tolist()
    rollouts = Rollouts.from_demonstrations([row[:16] for row in tokens], [row[16:] for row in tokens])
    schedule = policy.schedule(rollouts.sequence_lengths)
    policy.train_step(rollouts, schedule, Supervised(float(rollouts.response_lengths.sum())), lr=1e-4)


def run(policy: Policy, config: Config, in_background: bool | None) -> float:
    """Mean seconds per step; None saves nothing."""
    pending: PendingCheckpoint | None = None
    started = time.perf_counter()
    for number in range(1, STEPS + 1):
        step(policy, number)
        if pending is not None and pending.is_written():
            pending.complete()
            pending = None
        if in_background is not None and number % EVERY == 0:
            if pending is not None:
                pending.complete()
            pending = PendingCheckpoint(
                policy, config, RunProgress("step", number), in_background=in_background
            )
            if not in_background:
                pending.complete()
                pending = None
    seconds = time.perf_counter() - started
    if pending is not None:  # it would overlap with the next run
        pending.complete()
    shutil.rmtree(Path(config.run.dir) / "checkpoints", ignore_errors=True)
    return seconds / STEPS


def write_one(policy: Policy, config: Config, folder: Path) -> dict[str, float]:
    """One checkpoint, and a plain write of as many bytes, both until they are on disk."""
    started = time.perf_counter()
    pending = PendingCheckpoint(policy, config, RunProgress("step", 1))
    pending.complete()
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in pending.final.iterdir())
    shutil.rmtree(pending.final)
    content = memoryview(bytearray(os.urandom(2**20)) * (size // 2**20))
    started = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    plain = time.perf_counter() - started
    (folder / "plain").unlink()
    return {"bytes": size, "writer": size / seconds / 1e6, "plain": len(content) / plain / 1e6}


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
