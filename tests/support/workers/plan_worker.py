"""Measures a recipe's ranks on the meta device, which needs its own process; prints JSON.

plan_worker.py RECIPE GPUS NEEDS LAYOUT…    a layout is `key=value,key=value…` of policy
"""

from __future__ import annotations

import json
import sys
from typing import Any

from opo_megatron.config import load_config
from opo_megatron.plan.activations import activation_peak
from opo_megatron.plan.ranks import fake_rank, meta_policy, rank_bytes, use_meta_device
from opo_megatron.plan.sync import check_cover, combine, rank_stream


def measure(recipe: str, gpus: int, streams: bool, layout: str, model: list[str]) -> dict[str, Any]:
    overrides = [f"policy.{key}" for key in layout.split(",") if key]
    config = load_config(recipe, ["run.dir=unused", *model, *overrides], gpus)
    vocab_size = config.policy.model.vocab_size
    assert vocab_size is not None
    result: dict[str, Any] = {"ranks": []}
    received = []
    for rank in range(gpus):
        with fake_rank(config, rank, gpus) as parallel:
            policy = meta_policy(config, vocab_size, parallel)
            result["ranks"].append(vars(rank_bytes(policy)))
            if not streams:
                continue
            stream = rank_stream(policy, 2, config)
            result["tensors"] = check_cover(stream)
            received.append(stream)
            samples = [(8, 24)] * (8 * parallel.dp_size)
            result["ranks"][-1]["activations"] = activation_peak(policy, samples, on_gpus=True)
    if streams:
        sync = combine(received, result["tensors"])
        result["bytes"] = sync.total
        result["received"] = [[traffic.nvlink, traffic.network] for traffic in sync.received]
    return result


if __name__ == "__main__":
    use_meta_device()
    recipe, gpus, needs, *layouts = sys.argv[1:]
    model = [one for one in layouts if one.startswith("policy.model.")]
    layouts = [one for one in layouts if one not in model]
    print(json.dumps([measure(recipe, int(gpus), needs == "streams", one, model) for one in layouts]))
