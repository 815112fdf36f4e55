"""Accuracy of `opo plan`: memory against allocations of CPU ranks, times against published throughput.

    python tools/bench_plan.py             everything; writes records/plan.json
    python tools/bench_plan.py --memory    only memory; writes nothing (CPU ranks: two minutes)
    python tools/bench_plan.py --times     only times; writes nothing

Memory: `tools/bench/plan_memory.py`, six layouts; within 10 % on every rank, else exit code 1.

Times: one constant, `step_overhead`, is fitted to the first row; the others are predictions, reported with
their errors.  The rows are on-policy GRPO on H100s in bf16 (NeMo RL's performance summary), with the usual 5
units of compute per step: old and reference log-probabilities in addition to the update.  Sequences are
packed, so there is no padding, and the sync is part of the overhead.  Assumed where a row does not state it:
2,048 rollouts of at most 4,096 tokens; a mean of 3,206 tokens for Qwen3-32B, from an earlier version of the
same table; prompts of 100 tokens.  The last row is training alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

LARGEST_ERROR = 0.1
"""Maximum relative error of memory."""
LARGEST_MISFIT = 0.01
"""Maximum relative error of the fitted row, whose constant is rounded."""


@dataclass(frozen=True)
class PublishedRun:
    """One published run."""

    model: str
    gpus: int
    tokens_per_gpu: float
    """Tokens per second and GPU."""
    mean_tokens: float
    """Mean tokens of a sample, prompt and response."""
    pipeline: int
    data_parallel: int
    engine_tp: int
    longest: int = 4096
    samples: int = 2048
    prompt: float = 100.0
    expert_parallel: int = 1
    tensor: int = 1


FITTED = PublishedRun("Llama-3.1-8B", 16, 1581, 1019, pipeline=2, data_parallel=8, engine_tp=1)
PREDICTED = (
    PublishedRun("Qwen3-32B", 32, 571, 3206, pipeline=4, data_parallel=2, engine_tp=4, tensor=4),
    PublishedRun("Qwen3-30B-A3B", 32, 1102, 3306, 1, 32, engine_tp=1, expert_parallel=8),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="only memory")
    parser.add_argument("--times", action="store_true", help="only times")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    if not options.memory:
        results["times"] = times()
    if not options.times:
        results["memory"] = memory()
    print(json.dumps(results, indent=2))
    if not (options.memory or options.times):
        print(f"written to {write_record('plan', results)}")
    missed = unmet(results)
    for line in missed:
        print(f"NOT MET: {line}")
    return 1 if missed else 0


def unmet(results: dict[str, Any]) -> list[str]:
    missed = [
        f"memory of {layout}: off by {result['largest error']:.1%}, at most {LARGEST_ERROR:.0%}"
        for layout, result in results.get("memory", {}).items()
        if result["largest error"] > LARGEST_ERROR
    ]
    fitted = results.get("times", {}).get("fitted", {"error": 0.0})
    if abs(fitted["error"]) > LARGEST_MISFIT:
        missed.append(
            f"the fitted row is off by {fitted['error']:.1%}: step_overhead in hardware.py is out of date"
        )
    return missed


def memory() -> dict[str, Any]:
    from bench.plan_memory import LAYOUTS, measured, predicted

    results = {}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            allocated = measured(layout, Path(folder))
        counted = predicted(layout)
        errors = [count / bytes_ - 1 for count, bytes_ in zip(counted, allocated, strict=True)]
        results[layout] = {
            "bytes allocated": allocated,
            "bytes counted": counted,
            "largest error": max(map(abs, errors)),
        }
        print(f"{layout}: {results[layout]}", flush=True)
    return results


def times() -> dict[str, Any]:
    from opo_megatron.plan.hardware import GPUS, constant
    from opo_megatron.plan.models import MODELS
    from opo_megatron.plan.times import active_parameters

    counted = step_seconds(FITTED) / constant("step_overhead")
    model = MODELS["Llama-3-70B"]
    assert model.vocab_size is not None
    # TP4 PP8 VPP5, 8,192 tokens a sequence, 128 sequences a step: 64 micro-batches.
    ceiling = training_ceiling(sequence=8192, bubble=7 / (64 * 5))
    return {
        "step_overhead that fits": FITTED.samples
        * FITTED.mean_tokens
        / (FITTED.tokens_per_gpu * FITTED.gpus)
        / counted,
        "fitted": compare(FITTED),
        "predicted": {row.model: compare(row) for row in PREDICTED},
        "training ceiling, Llama-3-70B in FP8 on 64": {
            "published": 1664,
            "predicted": ceiling,
            "error": ceiling / 1664 - 1,
        },
        "parameters that multiply a token": active_parameters(model, model.vocab_size),
        "peak operations/s in FP8": GPUS["h100"].fp8,
    }


def compare(row: PublishedRun) -> dict[str, float]:
    predicted = row.samples * row.mean_tokens / step_seconds(row) / row.gpus
    return {
        "published": row.tokens_per_gpu, "predicted": predicted, "error": predicted / row.tokens_per_gpu - 1,
    }  # fmt: skip


def step_seconds(row: PublishedRun) -> float:
    """Seconds per step of a published run, by the planner's model."""
    from opo_megatron.plan.times import step_times

    return step_times(work_of(row), sync=0.0, moved_bytes=0).step


def work_of(row: PublishedRun) -> Any:
    from opo_megatron.config.schema import Config
    from opo_megatron.plan.engine import kv_bytes_per_token, weight_bytes
    from opo_megatron.plan.hardware import GPUS
    from opo_megatron.plan.lengths import Lengths
    from opo_megatron.plan.models import MODELS
    from opo_megatron.plan.times import Work

    config = Config()
    config.policy.model = MODELS[row.model]
    config.policy.dtype = type(config.policy.dtype)("bf16")
    vocab_size = config.policy.model.vocab_size
    assert vocab_size is not None
    longest = int(row.longest - row.prompt)
    lengths = Lengths(row.samples, row.prompt, row.mean_tokens - row.prompt, int(row.prompt), longest)
    engines = row.gpus // row.engine_tp
    return Work(
        model=config.policy.model,
        vocab_size=vocab_size,
        gpus=row.gpus,
        gpu=GPUS["h100"],
        lengths=lengths,
        trained_tokens=lengths.tokens,
        bubble=(row.pipeline - 1) / (row.samples / row.data_parallel),
        engine_tp=row.engine_tp,
        engine_weights=weight_bytes(config, vocab_size, row.engine_tp),
        engine_token=kv_bytes_per_token(config, row.engine_tp),
        running=row.samples // engines,
        engines=engines,
        passes=2.0,
        engine_experts=weight_bytes(config, vocab_size, row.engine_tp, experts=True),
        expert_parallel=row.expert_parallel,
        tensor_parallel=row.tensor,
        stages=row.pipeline,
        replica_bytes=6 * parameters_of_rank(row) if row.data_parallel > 1 else 0,
    )


def parameters_of_rank(row: PublishedRun) -> int:
    """Matrices are divided over tensor ranks, layers over the pipeline, experts over their ranks."""
    from opo_megatron.plan.models import MODELS
    from opo_megatron.weights.param_mapping import hf_shapes, is_expert

    model = MODELS[row.model]
    assert model.vocab_size is not None
    sizes = {name: math.prod(shape) for name, shape in hf_shapes(model, model.vocab_size).items()}
    return sum(
        size // (row.tensor * row.pipeline * (row.expert_parallel if is_expert(name) else 1))
        for name, size in sizes.items()
    )


def training_ceiling(sequence: int, bubble: float) -> float:
    """Tokens per second and GPU of training Llama-3-70B in FP8, without rollouts."""
    from dataclasses import replace

    from opo_megatron.plan.lengths import Lengths
    from opo_megatron.plan.times import training_seconds

    work = work_of(PublishedRun("Llama-3-70B", 64, 1664, sequence / 2, 8, 2, engine_tp=8, tensor=4))
    lengths = Lengths(128, 0.0, float(sequence), 0, sequence)
    work = replace(
        work,
        lengths=lengths,
        trained_tokens=lengths.tokens,
        bubble=bubble,
        passes=0.0,
        trains_in_fp8=True,
        chunks=5,
    )
    return lengths.tokens / training_seconds(work) / work.gpus


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
