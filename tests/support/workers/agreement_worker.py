"""One rank: the largest |Δ log-probability| of engine and policy under several parallel layouts.

    agreement_worker.py OUTPUT [override,override …]…

Rank 0 writes a list of {worst, tokens, exchanged}, one per layout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from opo_megatron.batch.redistribute import gather_to_rank0, local_slice, redistribute_to_dp
from opo_megatron.batch.stats import gather_stats
from opo_megatron.distributed.process_groups import (
    SMALL_BYTES,
    Parallel,
    all_gather_objects,
    destroy_model_parallel,
    initialize,
    shutdown,
)
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from tests.support.fixtures import VOCAB_SIZE, small_config, small_policy

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
PROMPTS, SAMPLES = 64, 4
TEMPERATURE = 0.9


def measure(overrides: list[str], parallel: Parallel) -> dict[str, object]:
    config = small_config(*overrides, world_size=WORLD_SIZE)
    policy = small_policy(config, parallel)
    engine = LocalEngine(
        config.policy.model, VOCAB_SIZE, torch.float32, parallel.device, 17, config.rollout.local.exact
    )
    engine.update_weights(policy.stream_weights(), 0)
    total = PROMPTS * SAMPLES
    own = local_slice(parallel, total)
    requests = [
        GenerationRequest(g, g, i % SAMPLES, tuple(1 + (g * k) % 16 for k in range(1, 2 + g % 9)))
        for i in range(own.start, own.stop)
        for g in [i // SAMPLES]
    ]
    sampling = Sampling(max_tokens=16, stop_tokens=(0,), seed=(7,), temperature=TEMPERATURE)
    rollouts = engine.generate(requests, sampling)
    rollouts.rewards = torch.zeros(len(rollouts), dtype=torch.float64)
    stats = gather_stats(parallel, rollouts)
    schedule = policy.schedule(stats.sequence_lengths)
    batch = redistribute_to_dp(parallel, rollouts, schedule, total)
    difference = (policy.log_probs(batch, schedule, TEMPERATURE) - batch.engine_log_prob).abs().max()
    all_rollouts = gather_to_rank0(parallel, rollouts)
    worst = max(all_gather_objects(parallel, float(difference)))
    return {
        "worst": worst,
        "tokens": all_rollouts.responses() if all_rollouts else None,
        "exchanged": exchanges_all_sizes(parallel),
    }


def exchanges_all_sizes(parallel: Parallel) -> bool:
    """Whether objects arrive whose pickles are around `SMALL_BYTES`, on one rank, the others, or all."""
    ranks = range(parallel.world_size)
    for size in (0, *range(SMALL_BYTES - 60, SMALL_BYTES + 2), 100_000):
        for large in (ranks[:1], ranks[1:], ranks):
            objects = [bytes([rank]) * (size if rank in large else 3) for rank in ranks]
            if all_gather_objects(parallel, objects[parallel.rank]) != objects:
                return False
    return True


def main() -> None:
    output, layouts = Path(sys.argv[1]), [a.split(",") if a else [] for a in sys.argv[2:]]
    results = []
    for overrides in layouts:
        parallel = initialize(small_config(*overrides, world_size=WORLD_SIZE))
        results.append(measure(overrides, parallel))
        destroy_model_parallel()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
