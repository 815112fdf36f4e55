"""Measures a step that overlaps training with generation, on two cores → records/overlap.json

    python tools/bench_overlap.py                            # about eleven minutes, alone on two cores
    python tools/bench_overlap.py --repetitions 1 --no-record

A real SGLang server on one core, the trainer on the other; the lift with responses of 3 to 60 tokens, 48
of 384 at a time.  Runs with and without `rollout.overlap` take turns on the same server.  `in turn` is
generation plus training of the runs without, `overlapped` the time to the optimizer step of those with.
The learning rate is next to 0, so that the lengths of all steps have one distribution.

The planner's simulation (`plan/overlap.py`) predicts the overlapped steps from their lengths.  Its constants
are measured: seconds of a decoding step (a + b · responses) and of admitting a response, by three very
different loads on the same server, scaled so that they sum to the generation of the runs in turn; and
seconds of a trained token, from those runs.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from bench.record import write_record

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.plan.overlap import decoded, simulate
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.server import free_port
from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
RECIPE = str(ROOT / "recipes" / "quickstart_sglang.yaml")
SAMPLES = 8
"""Of each prompt, in the recipe."""
CONSTANTS = ("a", "b", "seconds of an admitted response", "seconds of a trained token")
SLOTS, STEPS, SKIPPED, MICRO_BATCH = 48, 12, 2, 2048
MODEL = (
    "policy.device=cpu", "task.options.moves=12", "policy.model.max_sequence_length=96",
    "rollout.max_response_tokens=60", "policy.model.num_layers=4", "policy.model.vocab_size=17",
    "policy.model.hidden_size=192", "policy.model.ffn_hidden_size=512",
    f"rollout.sglang.max_running_requests={SLOTS}",
)  # fmt: skip
RUN = (
    f"train.steps={STEPS}", "warm_start.steps=100", "eval.every_steps=0", "eval.problems=16",
    "checkpoint.at_end=false", "observe.audit=false", "observe.kl=off",
    f"policy.max_tokens_per_micro_batch={MICRO_BATCH}", "policy.recompute=full",
    "optimizer.lr=1e-9",
)  # fmt: skip
Rows = list[dict[str, Any]]
"""Rows of metrics.jsonl, each with its `lengths`, group by group, and mean `prompt`."""
Load = tuple[list[float], float]
"""(decoding steps, Σ responses over them, responses), seconds."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--sglang-python", default=str(ROOT / ".venv-sglang" / "bin" / "python"))
    options = parser.parse_args()
    in_turn: list[Rows] = []
    overlapped: list[Rows] = []
    loads: list[Load] = []
    with tempfile.TemporaryDirectory() as folder, a_server(Path(folder), options.sglang_python) as server:
        for repetition in range(options.repetitions):
            for runs, overlaps in ((in_turn, False), (overlapped, True)):
                name = f"{repetition}_{'overlapped' if overlaps else 'in_turn'}"
                runs.append(run(Path(folder) / name, server, overlaps))
                print(f"{name}: median step {median(map(seconds_of, runs[-1])):.2f} s", flush=True)
            loads += measured_loads(Path(folder), server, in_turn[-1][-1])
    results = summarize(in_turn, overlapped, loads)
    print(json.dumps(results, indent=2))
    if not options.no_record:
        print(f"written to {write_record('overlap', results)}")
    missed = [
        f"{name} is {results[name]:.2f}, at most {most}"
        for name, most in (("overlapped / in turn", 0.85), ("overlapped / simulated", 1.15))
        if results[name] > most
    ]
    for line in missed:
        print(f"NOT MET: {line}")
    return 1 if missed else 0


def on_core(core: int) -> Any:
    """What a child process runs before its program: it and its children stay on this core."""
    cores = sorted(os.sched_getaffinity(0))
    return partial(os.sched_setaffinity, 0, {cores[core % len(cores)]})


@contextmanager
def a_server(folder: Path, python: str) -> Iterator[list[str]]:
    """An SGLang server on the second core; yields the overrides by which a run uses it."""
    port, key = free_port(), f"rollout.sglang.api_key_file={folder / 'key'}"
    command = [sys.executable, "-m", "opo_megatron", "serve", RECIPE, f"rollout.sglang.python={python}", key]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, *MODEL, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            preexec_fn=on_core(1),
        )
    try:
        for _ in range(300):
            time.sleep(1)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None:
                    sys.exit((folder / "server.log").read_text()[-2000:])
        else:
            sys.exit(
                f"the server did not answer for five minutes: {(folder / 'server.log').read_text()[-2000:]}"
            )
        yield [f"rollout.sglang.urls=[http://127.0.0.1:{port}]", key]
    finally:
        server.terminate()
        server.wait()


def run(folder: Path, server: list[str], overlaps: bool) -> Rows:
    """One whole `opo train` on the first core."""
    command = [sys.executable, "-m", "opo_megatron", "train", RECIPE, f"run.dir={folder}", *MODEL, *RUN]
    command += [*server, f"rollout.overlap={str(overlaps).lower()}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, preexec_fn=on_core(0))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["step"] > SKIPPED]
    for row in rows:
        rollouts = Rollouts.load(folder / "rollouts" / f"step_{row['step']:08d}.safetensors")
        row["lengths"] = rollouts.response_lengths.tolist()
        row["prompt"] = round(float(rollouts.prompt_lengths.double().mean()))
    return rows


def measured_loads(folder: Path, server: list[str], row: dict[str, Any]) -> list[Load]:
    """Seconds of a step's own lengths, of a full batch of long responses, and of many short ones."""
    url = server[0].partition("[")[2].rstrip("]")
    client = Client(url, 600.0, (folder / "key").read_text().strip())
    draw = random.Random(1)
    result: list[Load] = []
    for lengths in 2 * [row["lengths"], SLOTS * [60], len(row["lengths"]) * [2]]:
        groups = -(-len(lengths) // SAMPLES)
        prompts = [[draw.randrange(2, 17) for _ in range(row["prompt"])] for _ in range(groups)]
        client.post("/flush_cache?timeout=30")
        began = time.perf_counter()
        client.post(
            "/generate",
            input_ids=[prompts[i // SAMPLES] for i in range(len(lengths))],
            sampling_params=[{"max_new_tokens": length, "ignore_eos": True} for length in lengths],
            return_logprob=True,
        )
        result.append((features(lengths, row["prompt"]), time.perf_counter() - began))
    return result


def features(lengths: list[int], prompt: int) -> list[float]:
    """What generation is linear in: decoding steps, Σ responses over them, responses."""
    ends = decoded(lengths, prompt, SLOTS, lambda running, cached: 1.0)
    return [max(ends), float(sum(lengths)), float(len(lengths))]


def seconds_of(row: dict[str, Any]) -> float:
    """From the first request to the optimizer step."""
    return float(row["time/rollout"] + row.get("time/tail", row["time/train"] + row.get("time/reward", 0.0)))


def summarize(in_turn: list[Rows], overlapped: list[Rows], loads: list[Load]) -> dict[str, Any]:
    """Ratios of sums over all steps; seconds per 1,000 response tokens, because lengths differ a little."""
    constants = fitted([row for rows in in_turn for row in rows], loads)
    ratios = [per_token(b) / per_token(a) for a, b in zip(in_turn, overlapped, strict=True)]
    all_in_turn = [row for rows in in_turn for row in rows]
    all_overlapped = [row for rows in overlapped for row in rows]
    simulated = sum(simulated_seconds(row, constants) for row in all_overlapped)
    measured = sum(map(seconds_of, all_overlapped))
    return {
        "slots": SLOTS,
        "steps": len(all_overlapped),
        "response tokens, shortest and longest": [
            min(min(row["lengths"]) for row in all_overlapped),
            max(max(row["lengths"]) for row in all_overlapped),
        ],
        "in turn, s per step": {
            "generation": median(row["time/rollout"] for row in all_in_turn),
            "training": median(row["time/train"] for row in all_in_turn),
        },
        "overlapped, s per step": {
            "until the last response": median(row["time/rollout"] for row in all_overlapped),
            "after it": median(row["time/tail"] for row in all_overlapped),
            "training": median(row["time/train"] for row in all_overlapped),
        },
        "training hidden": median(row["overlap/hidden"] for row in all_overlapped),
        "overlapped / in turn": per_token(all_overlapped) / per_token(all_in_turn),
        "overlapped / in turn, by repetition": ratios,
        "overlapped / simulated": measured / simulated,
        "constants": dict(zip(CONSTANTS, constants, strict=True)),
    }


def per_token(rows: Rows) -> float:
    """Seconds of these steps per 1,000 response tokens."""
    return 1e3 * sum(map(seconds_of, rows)) / sum(sum(row["lengths"]) for row in rows)


def fitted(rows: Rows, loads: list[Load]) -> tuple[float, ...]:
    """`CONSTANTS`; the first three fit `loads` in relative error, and are then scaled to `rows`."""
    weighted = np.array([[one / seconds for one in parts] for parts, seconds in loads])
    shape, *_ = np.linalg.lstsq(weighted, np.ones(len(loads)), rcond=None)
    if (shape < 0).any():
        sys.exit(f"no time of a decoding step fits the loads {loads}; is another program running?")
    expected = sum(float(shape @ features(row["lengths"], row["prompt"])) for row in rows)
    scale = sum(row["time/rollout"] for row in rows) / expected
    tokens = sum(sum(row["lengths"]) + row["prompt"] * len(row["lengths"]) for row in rows)
    return *(float(one * scale) for one in shape), sum(row["time/train"] for row in rows) / tokens


def simulated_seconds(row: dict[str, Any], constants: tuple[float, ...]) -> float:
    a, b, admission, trained_token = constants
    timeline = simulate(
        row["lengths"], SAMPLES, row["prompt"], 1, SLOTS, lambda running, cached: a + b * running,
        lambda tokens: trained_token * tokens, 2 * MICRO_BATCH, began=admission * len(row["lengths"]),
    )  # fmt: skip
    return timeline.step


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
