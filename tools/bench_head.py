"""Benchmarks the LM head against Megatron's and autograd's, in seconds and memory → records/head.json

    python tools/bench_head.py                          # both sizes, one thread
    python tools/bench_head.py --sizes 512x4096x256     # tokens × vocabulary × hidden; writes nothing

All three compute per-token log-probabilities and the gradients of Σ c·log π with respect to hidden states
and output matrix, the latter accumulated into an existing buffer.  `ours` also computes entropy and Σπ².
`megatron` is `vocab_parallel_cross_entropy` on full logits, as its GPT model calls it; `autograd` is
log_softmax and gather; `floor` is the three matrix products alone.  Seconds: interleaved in one process, the
minimum of each, because noise only adds time.  Memory: each in its own process, the peak resident set of the
first pass minus that before it.  Exit code 1 where a limit is not met or results differ.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import write_record
from bench_weights import resident

from opo_megatron.utils.terminal import prepare_terminal

SIZES = ("2048x32768x512", "2048x65536x1024")
ARMS = ("ours", "megatron", "autograd")
ROUNDS = 5
LARGEST_MEMORY = 0.15
"""Multiple of autograd's."""
LARGEST_TIME = 1.0
"""Multiple of the fastest other head's."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", metavar="TxVxH", help="other sizes; writes no record")
    parser.add_argument("--arms", nargs=2, metavar=("SIZE", "NAMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arms:
        size, names = options.arms
        print(json.dumps(run_arms(size, names.split(","))))
        return 0
    results = {size: compare(size) for size in options.sizes or SIZES}
    print(json.dumps(results, indent=2))
    if options.sizes is None:
        print(f"written to {write_record('head', results)}")
    missed = [
        f"{size}: {name} is {result[name]:.3g}, at most {limit:g}"
        for size, result in results.items()
        for name, limit in (
            ("extra memory, ours / autograd", LARGEST_MEMORY),
            ("seconds, ours / fastest other", LARGEST_TIME),
            ("largest relative difference of results", 1e-4),
        )
        if not result[name] <= limit
    ]
    for line in missed:
        print(f"NOT MET: {line}")
    return 1 if missed else 0


def compare(size: str) -> dict[str, Any]:
    """The three heads on the same inputs."""
    alone = {arm: in_subprocess(size, arm) for arm in ARMS}
    seconds = in_subprocess(size, ",".join((*ARMS, "floor")))["seconds"]
    memory = {arm: result["bytes over baseline"] for arm, result in alone.items()}
    norms = {arm: result["norms"] for arm, result in alone.items()}
    return {
        "seconds": seconds,
        "bytes over baseline": memory,
        "extra memory, ours / autograd": memory["ours"] / memory["autograd"],
        "extra memory, ours / megatron": memory["ours"] / memory["megatron"],
        "seconds, ours / autograd": seconds["ours"] / seconds["autograd"],
        "seconds, ours / megatron": seconds["ours"] / seconds["megatron"],
        "seconds, ours / floor": seconds["ours"] / seconds["floor"],
        "seconds, ours / fastest other": seconds["ours"] / min(seconds["megatron"], seconds["autograd"]),
        "largest relative difference of results": max(
            abs(norms["ours"][name] / norms[other][name] - 1) for other in ARMS[1:] for name in norms["ours"]
        ),
    }


def in_subprocess(size: str, arms: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--arms", size, arms]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{size}  {arms}: {result}", flush=True)
    return result


def run_arms(size: str, names: list[str]) -> dict[str, Any]:
    """Interleaved passes of some heads; memory and results are those of the first head's first pass."""
    import torch

    tokens, rows, hidden_size = (int(number) for number in size.split("x"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    weight = torch.randn(rows, hidden_size, generator=generator) * 0.05
    targets = torch.randint(0, rows, (tokens,), generator=generator)
    coefficients = torch.randn(tokens, generator=generator) / tokens
    d_weight = torch.zeros_like(weight)
    heads = {"ours": ours, "megatron": megatron, "autograd": autograd, "floor": floor}
    works = {name: heads[name](hidden, weight, targets, coefficients, d_weight) for name in names}
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    log_probs, d_hidden = works[names[0]]()
    peak = resident("VmHWM") - before
    named = {"log π": log_probs, "dH": d_hidden, "dW": d_weight}
    norms = {key: float(value.double().norm()) for key, value in named.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(ROUNDS if len(names) > 1 else 0):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    return {
        "bytes over baseline": peak,
        "norms": norms,
        "seconds": {name: min(times) for name, times in seconds.items() if times},
    }


Work = Callable[[], tuple[Any, Any]]


def ours(hidden: Any, weight: Any, targets: Any, coefficients: Any, d_weight: Any) -> Work:
    from opo_megatron.kernels.lm_head import VocabularyShard, chunked_logprobs, default_chunk_tokens

    chunk = default_chunk_tokens(weight.shape[0])

    def coefficient(log_prob: Any, part: slice) -> tuple[Any, Any]:
        return coefficients[part] * log_prob, coefficients[part]

    def work() -> tuple[Any, Any]:
        output = chunked_logprobs(
            hidden, weight, targets, VocabularyShard(0), 1.0, chunk, coefficient, d_weight
        )
        return output.log_prob, output.d_hidden

    return work


def megatron(hidden: Any, weight: Any, targets: Any, coefficients: Any, d_weight: Any) -> Work:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from opo_megatron.config import load_config
    from opo_megatron.distributed.process_groups import initialize

    recipe = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
    initialize(load_config(str(recipe), ["run.dir=unused"], 1))

    def log_probs(hidden: Any, weight: Any) -> Any:
        logits = hidden.unsqueeze(1) @ weight.t()  # [s, b, V], as in Megatron
        return -vocab_parallel_cross_entropy(logits.float(), targets.unsqueeze(1))[:, 0]

    return differentiated(log_probs, hidden, weight, coefficients, d_weight)


def autograd(hidden: Any, weight: Any, targets: Any, coefficients: Any, d_weight: Any) -> Work:
    def log_probs(hidden: Any, weight: Any) -> Any:
        return (hidden @ weight.t()).log_softmax(-1).gather(1, targets.unsqueeze(1))[:, 0]

    return differentiated(log_probs, hidden, weight, coefficients, d_weight)


def floor(hidden: Any, weight: Any, targets: Any, coefficients: Any, d_weight: Any) -> Work:
    """z = H Wᵀ, dH = z W and dW += zᵀ H: three full matrix products, with meaningless values."""
    import torch

    def work() -> tuple[Any, Any]:
        logits = torch.mm(hidden, weight.t())
        d_hidden = torch.mm(logits, weight)
        d_weight.addmm_(logits.t(), hidden)
        return logits[:, 0], d_hidden

    return work


def differentiated(
    log_probs: Callable[[Any, Any], Any], hidden: Any, weight: Any, coefficients: Any, d_weight: Any
) -> Work:
    """Log-probabilities with gradients by autograd; the weight's is accumulated in `d_weight`."""

    def work() -> tuple[Any, Any]:
        leaf, matrix = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        leaf.grad, matrix.grad = None, d_weight
        log_prob = log_probs(leaf, matrix)
        (coefficients * log_prob).sum().backward()
        return log_prob.detach(), leaf.grad

    return work


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
