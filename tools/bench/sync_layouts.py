"""Full tensors against slices: bytes and time of a sync to a real SGLang server of two ranks.

Beside them a bare copy of the bytes that the server's ranks keep: into shared memory here, and out of it in
one other process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINE_RANKS = 2
LAYOUTS = ("full", "slices")


def measure_layouts(size: str, vocab_size: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both layouts and the bare copy of one model, `repeats` times, interleaved."""
    from bench_sync import bare_copies, config_of, timed

    from opo_megatron.build import start_policy
    from opo_megatron.distributed.process_groups import initialize, shutdown
    from opo_megatron.rollout.sglang.engine import SglangEngine
    from opo_megatron.rollout.sglang.server import Server, write_model_config

    ranks = f"rollout.sglang.tensor_parallel_size={ENGINE_RANKS}"
    config = config_of(size, folder, options.sglang_python, ranks)
    parallel = initialize(config)
    policy = start_policy(config, parallel, vocab_size, config.optimizer, needs_weights=True)
    write_model_config(config, vocab_size, folder / "model")
    server = Server(config, folder / "model", folder / "server.log", "server", None)
    runs: dict[str, list[float]] = {name: [] for name in (*LAYOUTS, "bare")}
    try:
        server.start(lambda line: None)
        engines = {
            layout: SglangEngine(
                config_of(
                    size, folder, options.sglang_python, ranks, f"rollout.sglang.layout={layout}",
                    url=server.url,
                ),
                parallel, folder / "model", print,
            )
            for layout in LAYOUTS
        }  # fmt: skip
        kept = kept_buckets(engines["slices"], policy)
        sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in kept]
        with bare_copies(folder, sizes) as bare:
            for i in range(options.repeats + 1):
                for name in runs:
                    policy.version += 1
                    work: Callable[[], None] = (
                        (lambda: bare["tensor"](kept))
                        if name == "bare"
                        else lambda name=name: engines[name].update_weights(  # type: ignore[misc]
                            policy.stream_weights(), policy.version
                        )
                    )
                    seconds, _ = timed(work)
                    print(f"  {name:8} {seconds:.3f} s", flush=True)
                    if i:  # after one round to warm up
                        runs[name].append(seconds)
        for engine in engines.values():
            engine.close()
        full = sum(tensor.nbytes for bucket in policy.stream_weights() for _, tensor in bucket)
    finally:
        server.stop()
    shutdown()
    return summary(runs, full, sum(sizes), len(sizes))


def kept_buckets(engine: Any, policy: Any) -> list[list[tuple[str, Any]]]:
    """The slices of all ranks of the server, in memory of this process."""
    stream = policy.stream_weights().slices(engine._slices._routes)
    return [[pair for named in bucket.values() for pair in named] for bucket in stream]


def summary(runs: dict[str, list[float]], full: int, kept: int, buckets: int) -> dict[str, Any]:
    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    return {
        "engine ranks": ENGINE_RANKS,
        "bytes that the server's ranks keep": kept,
        "bytes that its ranks are sent": {"full": ENGINE_RANKS * full, "slices": kept},
        "bytes put into shared memory": {"full": full, "slices": kept},
        "buckets of slices": buckets,
        "median seconds": medians,
        "slices / bare": medians["slices"] / medians["bare"],
        "full / slices": medians["full"] / medians["slices"],
        "runs": runs,
    }
