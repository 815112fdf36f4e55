"""Benchmarks the loop: a quickstart from a clean checkout, then decoding and training against the usual
implementations, with the same weights and the same samples, on one thread → records/loop.json

python tools/bench_loop.py                            # clone, `make quickstart`, compare
python tools/bench_loop.py --run runs/quickstart      # compare only, on a finished quickstart; writes nothing

Decoding is compared with transformers' `generate` on the same prompts: with its default cache and stop tokens
(counting real tokens per second), and with its static cache and every response at maximum length.  At the end
of the quickstart all responses have the same length, so `generate` wastes nothing on finished ones; after the
warm start lengths differ.  Training is compared with the same model in plain PyTorch (`bench/plain_torch.py`)
on the same micro-batches, all with nonzero advantages.  Exit code 1 where a requirement of `CLAIMS` is not
met.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
PHASES = ("rollout", "reward", "train", "sync")
REPEATS = 7

CLAIMS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "decoding responses of different lengths (after the warm start): at least 2.2 × generate": lambda r: (
        r["decoding"]["after the warm start"]["natural stops, ours / generate"] >= 2.2
    ),
    "decoding at full length: at least generate's static cache": lambda r: all(
        at["full length, ours / generate with a static cache"] >= 1.0 for at in r["decoding"].values()
    ),
    "training: at least 0.7 × plain PyTorch": lambda r: all(
        at["ours / plain PyTorch"] >= 0.7 for at in r["training"].values()
    ),
    "a step takes at most 0.6 s": lambda r: r["quickstart"]["median seconds of a step"] <= 0.6,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="a finished quickstart; writes no record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.run is not None:
            results = {"quickstart": phases(arguments.run)} | compare(arguments.run, Path(folder))
        else:
            clone = Path(folder) / "opo_megatron"
            seconds = end_to_end(clone)
            run = clone / "runs" / "quickstart"
            results = {
                "from a clean checkout": seconds | shares(run, seconds["make quickstart, all of it"]),
                "quickstart": phases(run),
            } | compare(run, Path(folder))
    print(json.dumps(results, indent=2))
    if arguments.run is None:
        print(f"written to {write_record('loop', results)}")
    missed = [claim for claim, holds in CLAIMS.items() if not holds(results)]
    for claim in missed:
        print(f"NOT MET: {claim}")
    return 1 if missed else 0


# ---------------------------------------------------------------------- the quickstart


def end_to_end(clone: Path) -> dict[str, float]:
    """Clone the last commit and run the README's first command in it."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    started = time.monotonic()
    subprocess.run(["make", "setup"], cwd=clone, env=environment, check=True)
    installed = time.monotonic()
    subprocess.run(["make", "quickstart"], cwd=clone, env=environment, check=True)
    ended = time.monotonic()
    return {"make quickstart, all of it": ended - started, "install": installed - started}


def rows_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def shares(run: Path, total: float) -> dict[str, Any]:
    """Seconds of a whole `make quickstart` by phase, and as shares of `total`."""
    rows, warm = rows_of(run, "metrics.jsonl"), rows_of(run, "warm_start.jsonl")
    seconds = {"warm start": sum(row["time/step"] for row in warm)}
    for phase in (*PHASES, "eval"):
        seconds[f"steps, {phase}"] = sum(row.get(f"time/{phase}", 0.0) for row in rows)
    return {"seconds by phase": seconds, "shares": {name: s / total for name, s in seconds.items()}}


def phases(run: Path) -> dict[str, Any]:
    """Median seconds of an OPO step of 48 × 8 samples, by phase, evaluations excluded."""
    rows = rows_of(run, "metrics.jsonl")[1:]
    without_evaluation = [row["time/step"] - row.get("time/eval", 0.0) for row in rows]
    return {
        "median seconds of a step": statistics.median(without_evaluation),
        "largest of a step": max(without_evaluation),
        "median seconds by phase": {p: statistics.median(r[f"time/{p}"] for r in rows) for p in PHASES},
        "mean response length, median over steps": statistics.median(r["response_length/mean"] for r in rows),
    }


# ---------------------------------------------------------------------- comparisons


def compare(run: Path, folder: Path) -> dict[str, Any]:
    """Decoding and training with the weights after the warm start and at the end of `run`."""
    last = max((run / "checkpoints").glob("step_*"))
    checkpoints = {
        "after the warm start": max((run / "checkpoints").glob("warm_start_*")),
        "at the end": last,
    }
    results: dict[str, Any] = {"decoding": {}, "training": {}}
    for i, (name, checkpoint) in enumerate(checkpoints.items()):
        decoding, training = measure(checkpoint, folder / f"measured{i}")
        results["decoding"][name], results["training"][name] = decoding, training
    return results


def measure(checkpoint: Path, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """One checkpoint's decoding and training tokens per second."""
    import torch

    from opo_megatron.build import open_run
    from opo_megatron.config import load_config

    overrides = [f"run.dir={folder}", f"resume={checkpoint}", "warm_start.steps=500", "observe.kl=off"]
    config = load_config(str(ROOT / "recipes" / "quickstart.yaml"), overrides, 1)
    torch.set_num_threads(1)
    with open_run(config) as run:
        run.generation.synchronize()
        weights = {name: tensor.clone() for bucket in run.policy.stream_weights() for name, tensor in bucket}
        return decoding(run, weights), training(run, weights)


def best_of(*candidates: Callable[[], int]) -> list[float]:
    """Maximum tokens per second of each candidate, interleaved so that load on the machine affects all."""
    best = [0.0] * len(candidates)
    for _ in range(REPEATS):
        for i, candidate in enumerate(candidates):
            started = time.perf_counter()
            tokens = candidate()
            best[i] = max(best[i], tokens / (time.perf_counter() - started))
    return best


def decoding(run: Any, weights: dict[str, Any]) -> dict[str, float]:
    import torch

    from opo_megatron.rollout.requests import requests_for, training_sampling

    model, stop = hugging_face_model(run, weights), run.task.stop_tokens[0]
    requests = requests_for(run.prompts(1), run.config.rollout.samples_per_prompt, run.parallel)
    sampling = training_sampling(run.config, run.task, 1)
    # All prompts of the lift have one length, so `generate` needs no padding.
    prompts = torch.tensor([request.tokens for request in requests])

    def ours(stops: tuple[int, ...]) -> int:
        rollouts = run.generation.engine.generate(requests, replace(sampling, stop_tokens=stops))
        return int(rollouts.response_lengths.sum())

    def reference(stop: int | None, cache: str | None) -> int:
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=stop,
            pad_token_id=0,
            cache_implementation=cache,
            disable_compile=True,
        )
        responses = output[:, prompts.shape[1] :]
        if stop is None:
            return responses.numel()
        finished = (responses == stop).cumsum(1) > 0
        return int((~finished).sum() + finished.any(1).sum())

    names = ("ours", "generate", "ours, full length", "generate, full length", "generate, static cache")
    rates = best_of(
        lambda: ours((stop,)),
        lambda: reference(stop, None),
        lambda: ours(()),
        lambda: reference(None, None),
        lambda: reference(None, "static"),
    )
    speed = dict(zip(names, rates, strict=True))
    return {f"tokens per second: {name}": rate for name, rate in speed.items()} | {
        "batch": float(len(requests)),
        "natural stops, ours / generate": speed["ours"] / speed["generate"],
        "full length, ours / generate": speed["ours, full length"] / speed["generate, full length"],
        "full length, ours / generate with a static cache": (
            speed["ours, full length"] / speed["generate, static cache"]
        ),
    }


def hugging_face_model(run: Any, weights: dict[str, Any]) -> Any:
    """The policy as a transformers model."""
    import transformers

    model = run.config.policy.model
    hf_model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=run.task.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            head_dim=model.kv_channels,
            rms_norm_eps=model.layernorm_epsilon,
            max_position_embeddings=model.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
            tie_word_embeddings=model.tie_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    hf_model.load_state_dict(weights, strict=True)
    return hf_model


def training(run: Any, weights: dict[str, Any]) -> dict[str, float]:
    import torch
    from bench.plain_torch import PlainModel, policy_gradient_step

    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.batch.micro_batch import build_micro_batches
    from opo_megatron.rollout.requests import requests_for, training_sampling

    requests = requests_for(run.prompts(1), run.config.rollout.samples_per_prompt, run.parallel)
    all_rollouts = run.generation.engine.generate(requests, training_sampling(run.config, run.task, 1))
    # No advantage is 0, so neither implementation skips a sample.
    all_rollouts.advantages = torch.randn(len(requests), generator=torch.Generator().manual_seed(1)).double()
    lengths = all_rollouts.prompt_lengths + all_rollouts.response_lengths
    schedule, tokens = run.policy.schedule(lengths), int(lengths.sum())
    rollouts = all_rollouts.select(schedule.samples_of(0))
    normalizer = float(all_rollouts.response_lengths.sum())
    optimizer = run.config.optimizer
    plain = PlainModel(run.config.policy.model, run.task.vocab_size, weights)
    adam = torch.optim.AdamW(
        plain.parameters(), lr=0.0, betas=tuple(optimizer.betas), weight_decay=optimizer.weight_decay
    )
    norms: dict[str, float] = {}

    def ours() -> int:
        objective = PolicyGradient(normalizer, run.config.rollout.temperature)
        metrics = run.policy.train_step(rollouts, schedule, objective, 0.0, run.check_on_policy)
        norms["ours"] = metrics.grad_norm
        return tokens

    def plain_torch() -> int:
        advantages = torch.repeat_interleave(rollouts.advantages, rollouts.response_lengths).float()
        micro = build_micro_batches(rollouts, schedule, 0, {"advantages": advantages}, 1, run.parallel.device)
        norms["plain"] = policy_gradient_step(plain, adam, micro, normalizer, optimizer.clip)
        return tokens

    rates = best_of(ours, plain_torch)
    if abs(norms["ours"] / norms["plain"] - 1) > 1e-4:
        raise RuntimeError(f"the two steps do not compute the same gradient: norms {norms}")
    return {
        "tokens per second: ours": rates[0],
        "tokens per second: plain PyTorch": rates[1],
        "ours / plain PyTorch": rates[0] / rates[1],
        "gradient norm: ours": norms["ours"],
        "gradient norm: plain PyTorch": norms["plain"],
    }


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
