"""Counts ranks of a recipe on the meta device, which takes a process of its own; prints JSON.

plan_worker.py RECIPE GPUS NEEDS LAYOUT…    each layout is `key=value,key=value…` of policy
"""

from __future__ import annotations

import json
import sys
from typing import Any

from opo_megatron.config import load_config
from opo_megatron.plan.activations import activation_peak
from opo_megatron.plan.ranks import fake_rank, meta_policy, rank_bytes, use_meta_device
from opo_megatron.plan.sync import check_cover, combine, rank_stream


def count(recipe: str, gpus: int, streams: bool, keys: str, model: list[str]) -> dict[str, Any]:
    overrides = [f"policy.{key}" for key in keys.split(",") if key]
    config = load_config(recipe, ["run.dir=unused", *model, *overrides], gpus)
    vocab_size = config.policy.model.vocab_size
    assert vocab_size is not None
    found: dict[str, Any] = {"ranks": []}
    received = []
    for rank in range(gpus):
        with fake_rank(config, rank, gpus) as parallel:
            policy = meta_policy(config, vocab_size, parallel)
            found["ranks"].append(vars(rank_bytes(policy)))
            if not streams:
                continue
            stream = rank_stream(policy, gpus_per_node=2)
            found["tensors"] = check_cover(stream, policy)
            received.append(stream)
            samples = [(8, 24)] * (8 * parallel.dp_size)
            found["ranks"][-1]["activations"] = activation_peak(policy, samples, on_gpus=True)
    if streams:
        sync = combine(received, found["tensors"])
        found["bytes"] = sync.total
        found["received"] = [[traffic.nvlink, traffic.network] for traffic in sync.received]
    return found


if __name__ == "__main__":
    use_meta_device()
    recipe, gpus, needs, *layouts = sys.argv[1:]
    model = [one for one in layouts if one.startswith("policy.model.")]
    layouts = [one for one in layouts if one not in model]
    print(json.dumps([count(recipe, int(gpus), needs == "streams", one, model) for one in layouts]))
