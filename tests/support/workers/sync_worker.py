"""One rank: sends the same weights to a running server under one layout and writes the probe's result.

sync_worker.py OUTPUT URL [override …]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.rollout.probe import PROBE_SAMPLING, largest_difference, probe_requests
from opo_megatron.rollout.sglang.engine import SglangEngine
from tests.support.fixtures import VOCAB_SIZE, small_config, small_policy

VERSION = 41


def main() -> None:
    output, url, *overrides = sys.argv[1:]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = small_config(
        "rollout.engine=sglang", f"rollout.sglang.urls=[{url}]", *overrides, world_size=world_size
    )
    parallel = initialize(config)
    policy = small_policy(config, parallel)
    engine = SglangEngine(config, parallel, Path("unused"), print)
    engine.update_weights(policy.stream_weights(), VERSION)
    probes = engine.probe(probe_requests(config.policy.model, VOCAB_SIZE), PROBE_SAMPLING)
    difference, _ = largest_difference(policy, parallel, probes)
    if parallel.rank == 0:
        (rollouts,) = probes.values()
        assert rollouts.engine_log_prob is not None and rollouts.weight_versions is not None
        result = {
            "tokens": rollouts.responses(),
            "log_probs": rollouts.engine_log_prob.tolist(),
            "versions": rollouts.weight_versions.unique().tolist(),
            "difference": difference,
        }
        Path(output).write_text(json.dumps(result))
    engine.close()
    shutdown()


if __name__ == "__main__":
    main()
