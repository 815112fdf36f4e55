"""One rank: stores one policy's weights as reference weights, then measures another policy's KL to them.

    kl_worker.py OUTPUT [override,override …]…

Rank 0 writes a list of {kl, kl_per_response, restored, same}, one per layout.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from opo_megatron.batch.redistribute import local_slice
from opo_megatron.batch.stats import gather_stats
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    destroy_model_parallel,
    initialize,
    shutdown,
)
from opo_megatron.evaluation.evaluate import kl_to_reference
from opo_megatron.observe.console import Display
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.weights.reference_weights import ReferenceWeights
from tests.support.fixtures import VOCAB_SIZE, small_config, small_policy

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
PROMPTS, SAMPLES = 24, 2
TEMPERATURE = 0.9


def measure(folder: Path, overrides: list[str], parallel: Parallel) -> dict[str, object]:
    config = small_config(*overrides, f"eval.temperature={TEMPERATURE}", world_size=WORLD_SIZE)
    reference = ReferenceWeights(folder, parallel, config.policy.model, VOCAB_SIZE)
    reference.write(small_policy(config, parallel).stream_weights())
    reference.check(folder)
    config.run = replace(config.run, seed=2)
    policy = small_policy(config, parallel)
    engine = LocalEngine(
        config.policy.model, VOCAB_SIZE, policy.megatron_config.params_dtype, parallel.device, slots=17
    )
    engine.update_weights(policy.stream_weights(), 0)
    own_slice = local_slice(parallel, PROMPTS * SAMPLES)
    requests = [
        GenerationRequest(g, g, i % SAMPLES, tuple(1 + (g * k) % 16 for k in range(1, 2 + g % 9)))
        for i in range(own_slice.start, own_slice.stop)
        for g in [i // SAMPLES]
    ]
    sampling = Sampling(
        max_tokens=16, stop_tokens=(0,), seed=(7,), temperature=TEMPERATURE, routed_experts=True
    )
    rollouts = engine.generate(requests, sampling)
    rollouts.rewards = torch.zeros(len(rollouts), dtype=torch.float64)
    before = [p.detach().clone() for chunk in policy.chunks for p in chunk.parameters()]
    generation = SimpleNamespace(
        config=config, policy=policy, parallel=parallel, display=Display(active=False)
    )
    row = kl_to_reference(generation, rollouts, gather_stats(parallel, rollouts), reference)
    after = [p for chunk in policy.chunks for p in chunk.parameters()]
    restored = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    rows = all_gather_objects(parallel, (row, restored))
    return {
        "kl": row["eval/kl"],
        "kl_per_response": row["eval/kl_per_response"],
        "restored": all(whole for _, whole in rows),
        "same": all(other == row for other, _ in rows),
    }


def main() -> None:
    output, layouts = Path(sys.argv[1]), [a.split(",") if a else [] for a in sys.argv[2:]]
    results = []
    for number, overrides in enumerate(layouts):
        parallel = initialize(small_config(*overrides, world_size=WORLD_SIZE))
        results.append(measure(output.parent / f"{WORLD_SIZE}_{number}", overrides, parallel))
        destroy_model_parallel()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
