"""The weight sync of a recipe's plan, from some of its ranks: bytes that they receive and predicted seconds.

plan_slices_worker.py RECIPE RANK,RANK… [override,override …] …
"""

from __future__ import annotations

import json
import sys
from typing import Any

from opo_megatron.plan.hardware import GPUS, GPUS_PER_NODE
from opo_megatron.plan.plan import counted_config, load_job
from opo_megatron.plan.ranks import fake_rank, meta_policy, use_meta_device
from opo_megatron.plan.sync import check_cover, combine, rank_stream
from opo_megatron.plan.times import sync_seconds


def sync_of(recipe: str, ranks: str, overrides: list[str]) -> dict[str, Any]:
    job = load_job(recipe, overrides, None, GPUS["h100"], None)
    config, streams, tensors = counted_config(job), [], 0
    for rank in map(int, ranks.split(",")):
        with fake_rank(config, rank, job.gpus) as parallel:
            policy = meta_policy(config, job.vocab_size, parallel)
            streams.append(rank_stream(policy, GPUS_PER_NODE, config))
            tensors = max(tensors, check_cover(streams[-1]))
    sync = combine(streams, tensors)
    return {
        "why_full": sync.why_full,
        "tensors": tensors,
        "bytes": sync.total,
        "nvlink": [traffic.nvlink for traffic in sync.received],
        "network": [traffic.network for traffic in sync.received],
        "seconds": sync_seconds(sync, job.gpu),
    }


def main() -> None:
    recipe, ranks, *cases = sys.argv[1:]
    use_meta_device()
    print(json.dumps([sync_of(recipe, ranks, case.split(",")) for case in cases]))


if __name__ == "__main__":
    main()
