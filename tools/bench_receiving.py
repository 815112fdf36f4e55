"""Measures what receiving tokens as they are sampled costs → records/receiving.json

    python tools/bench_receiving.py                          # about six minutes, alone on two cores
    python tools/bench_receiving.py --pairs 2 --no-record

One real SGLang server on one core, the engine that asks it on another.  Calls of the engine with and without
a token channel (`rollout/sglang/token_channel.py`) take turns; every response has the same number of tokens,
so all calls do the same work.  The ratio of tokens/s, with / without, is that of neighbouring calls, with the
95 % interval of its mean.  Exit code 1 where the ratio is below GOAL.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist, mean, median, stdev
from typing import Any

import psutil
from bench.record import write_record

from opo_megatron.build import open_run
from opo_megatron.config import load_config
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.continuation import Continuation
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
GOAL = 0.97
RESPONSES, TOKENS, PROMPT = 48, 400, (1, 2, 3, 4)
SIZES = {"4 layers of 64": (4, 64), "4 layers of 256": (4, 256)}
"""The smaller the model, the more a token costs beside its forward pass."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20, help="calls of each kind (default: 20)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--sglang-python", default=str(ROOT / ".venv-sglang" / "bin" / "python"))
    options = parser.parse_args()
    results: dict[str, Any] = {"responses": RESPONSES, "tokens of each": TOKENS}
    for name, (layers, width) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(Path(folder), layers, width, options.pairs, options.sglang_python)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    if not options.no_record:
        print(f"written to {write_record('receiving', results)}")
    missed = [name for name in SIZES if results[name]["with / without"] < GOAL]
    for name in missed:
        print(f"NOT MET: {name}: {results[name]['with / without']:.3f}, at least {GOAL}")
    return 1 if missed else 0


def measure(folder: Path, layers: int, width: int, pairs: int, python: str) -> dict[str, Any]:
    """Tokens/s of calls with and without a channel, in turn."""
    config = load_config(
        str(ROOT / "recipes" / "quickstart_sglang.yaml"),
        [
            f"run.dir={folder / 'run'}", f"rollout.sglang.python={python}", "policy.device=cpu",
            "warm_start.steps=0", "observe.kl=off", "policy.model.max_sequence_length=512",
            f"policy.model.num_layers={layers}", f"policy.model.hidden_size={width}",
            f"rollout.sglang.max_running_requests={RESPONSES}",
        ],
    )  # fmt: skip
    with open_run(config) as run:
        run.generation.synchronize()
        engine = run.generation.engine
        assert isinstance(engine, SglangEngine) and engine._server is not None and engine._server.pid
        on_two_cores(engine._server.pid)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for number in range(-1, pairs):
            for receives in (number % 2 == 0, number % 2 != 0):
                speed = tokens_per_second(engine, receives, number, run.display.log)
                if number >= 0:  # the first pair warms up
                    speeds[receives].append(speed)
    return summarize(speeds[True], speeds[False])


def on_two_cores(server: int) -> None:
    """The server's processes on one core, this one on another."""
    cores = sorted(os.sched_getaffinity(0))
    for process in (psutil.Process(server), *psutil.Process(server).children(recursive=True)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {cores[-1]})
    os.sched_setaffinity(0, {cores[0]})


def tokens_per_second(engine: SglangEngine, receives: bool, number: int, log: Callable[[str], None]) -> float:
    engine._continuation = Continuation(receives, log)
    requests = [GenerationRequest(i, i, 0, PROMPT) for i in range(RESPONSES)]
    started = time.perf_counter()
    rollouts = engine.generate(requests, Sampling(TOKENS, (), (number,)))
    seconds = time.perf_counter() - started
    assert rollouts.response_lengths.tolist() == RESPONSES * [TOKENS]
    last = engine._continuation._last
    assert (0 if last is None else last.received.new_tokens) == (RESPONSES * TOKENS if receives else 0)
    return RESPONSES * TOKENS / seconds


def summarize(received: list[float], without: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(received, without, strict=True)]
    half = NormalDist().inv_cdf(0.975) * stdev(ratios) / math.sqrt(len(ratios))
    return {
        "tokens/s with a channel": median(received),
        "tokens/s without": median(without),
        "with / without": mean(ratios),
        "95 % interval": [mean(ratios) - half, mean(ratios) + half],
        "pairs": len(ratios),
    }


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
