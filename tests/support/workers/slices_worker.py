"""One rank: sends the same weights to a running server in full and as slices, under several layouts.

slices_worker.py OUTPUT PREFIX URL TP [recipe override …] [-- layout override,layout override …] …

Writes per layout what a greedy probe returns, the largest difference to the policy's log-probabilities, and
the names of files with the parameters of every rank of the server, afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from opo_megatron.distributed.process_groups import destroy_model_parallel, initialize, shutdown
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.probe import PROBE_SAMPLING, largest_difference, probe_requests
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.transfer import SliceTransfer, _copy_shared, pickled
from opo_megatron.weights.random_init import random_weights
from tests.support.fixtures import small_config

VOCAB = 100
"""Not a multiple of 64, to which the server pads."""


def weights(config):  # type: ignore[no-untyped-def]
    """Random ones, vectors too, so that none is like another."""
    source = random_weights(config.policy.model, VOCAB, 1)

    def distinct(name: str) -> torch.Tensor:
        tensor = source(name)
        if tensor.dim() > 1:
            return tensor
        seed = int.from_bytes(name.encode(), "little") % 2**31
        return tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))

    return distinct


def run(
    layout: str, prefix: str, number: int, url: str, tp: str, recipe: list[str]
) -> dict[str, object] | None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = small_config(
        *recipe, f"rollout.sglang.urls=[{url}]", f"rollout.sglang.tensor_parallel_size={tp}",
        "rollout.engine=sglang", *filter(None, layout.split(",")), world_size=world_size,
    )  # fmt: skip
    parallel = initialize(config)
    policy = Policy(config, VOCAB, parallel, config.optimizer, weights(config))
    engine = SglangEngine(config, parallel, Path("unused"), print)
    engine.update_weights(policy.stream_weights(), number)
    probes = engine.probe(probe_requests(config.policy.model, VOCAB), PROBE_SAMPLING)
    difference, _ = largest_difference(policy, parallel, probes)
    result = None
    if parallel.rank == 0:
        (rollouts,) = probes.values()
        assert rollouts.engine_log_prob is not None
        client = engine._clients[0]
        engine._open_update(client)
        shared = _copy_shared([(f"{prefix}{number}", torch.zeros(1))])
        body = {"serialized_named_tensors": [pickled(shared)] * int(tp), "load_format": "dump_weights.dump"}
        client.post("/update_weights_from_tensor", flush_cache=False, **body)
        engine._close_update(client, number)
        result = {
            "cut": isinstance(engine._transfers[url], SliceTransfer),
            "tokens": rollouts.responses(),
            "log_probs": rollouts.engine_log_prob.tolist(),
            "difference": difference,
        }
    engine.close()
    destroy_model_parallel()
    return result


def main() -> None:
    output, prefix, url, tp, *arguments = sys.argv[1:]
    end = arguments.index("--")
    recipe, layouts = arguments[:end], arguments[end + 1 :]
    results = [run(layout, prefix, number, url, tp, recipe) for number, layout in enumerate(layouts)]
    if results[0] is not None:
        Path(output).write_text(json.dumps(results))
    shutdown()


if __name__ == "__main__":
    main()
