"""One rank: digests of the policy's operations under several parallel layouts, against the engine's.

    exact_digest_worker.py OUTPUT [override,override …]…

Rank 0 writes, per layout, the operations that differ and how many were compared.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from opo_megatron.distributed.process_groups import Parallel, destroy_model_parallel, initialize, shutdown
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.exact_trace import policy_digests
from opo_megatron.rollout.local.engine import LocalEngine
from tests.support.fixtures import VOCAB_SIZE, small_config, small_policy

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
PROMPTS = ((3,), (5, 1, 2), tuple(range(17)))


def compare(overrides: list[str], parallel: Parallel) -> dict[str, object]:
    config = small_config("rollout.local.exact=true", *overrides, world_size=WORLD_SIZE)
    policy = small_policy(config, parallel)
    engine = LocalEngine(
        config.policy.model,
        VOCAB_SIZE,
        torch.float32,
        parallel.device,
        8,
        True,
        config.policy.exact_sum_parts,
    )
    engine.update_weights(policy.stream_weights(), 0)
    requests = [GenerationRequest(i, i, 0, prompt) for i, prompt in enumerate(PROMPTS)]
    rollouts, traces = engine.trace(requests, Sampling(max_tokens=6, stop_tokens=(0,), seed=(1,)))
    different, compared = set[str](), 0
    for i, expected in enumerate(traces):
        actual = policy_digests(policy, parallel, rollouts.select([i]))
        names = actual.keys() | expected.keys()
        different |= {name for name in names if actual.get(name) != expected.get(name)}
        compared += len(names)
    return {"different": sorted(different), "compared": compared}


if __name__ == "__main__":
    output, layouts = Path(sys.argv[1]), [argument.split(",") for argument in sys.argv[2:]]
    results = []
    for overrides in layouts:
        parallel = initialize(small_config(*overrides, "rollout.local.exact=true", world_size=WORLD_SIZE))
        results.append(compare(overrides, parallel))
        destroy_model_parallel()
    if parallel.rank == 0:
        output.write_text(json.dumps(results))
    shutdown()
