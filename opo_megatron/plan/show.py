"""A plan as tables, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from opo_megatron.plan.hardware import CONSTANTS, GPUS_PER_NODE
from opo_megatron.plan.plan import Phases, RunPlan

GB = 1e9


def to_json(plan: RunPlan, nearest: list[str] | None = None) -> dict[str, Any]:
    """The whole plan, in bytes and seconds."""
    job, sync = plan.job, plan.sync
    return {
        "gpus": job.gpus,
        "gpu": asdict(job.gpu),
        "parameters": plan.parameters,
        "fits": plan.problem is None,
        "problem": plan.problem,
        "nearest": nearest,
        "lengths": asdict(job.lengths),
        "ranks": [
            {**asdict(rank), **{f"{name}_phase": size for name, size in asdict(phases).items()}}
            for rank, phases in zip(plan.ranks, plan.phases, strict=True)
        ],
        "stages": [asdict(stage) for stage in plan.stages],
        "engine": {**asdict(plan.engine), "cached_tokens": plan.engine.cached_tokens},
        "sync": {
            "why_full": sync.why_full,
            "tensors": sync.tensors,
            "bytes": sync.total,
            "bucket_bytes": list(sync.bucket_bytes),
            "received": [asdict(traffic) for traffic in sync.received],
        },
        "micro_batches": plan.micro_batches,
        "padding": plan.padding,
        "times": {**asdict(plan.times), "step": plan.times.step},
        "gpu_hours": plan.gpu_hours,
        "constants": {name: constant._asdict() for name, constant in CONSTANTS.items()},
    }


def show(plan: RunPlan, console: Console) -> None:
    """Print tables: memory per rank, phases, weight sync, time."""
    job = plan.job
    gpus = f"{job.gpus} × {job.gpu.name.upper()} of {job.gpu.memory / GB:.0f} GB"
    console.print(f"{plan.parameters:,} parameters on {gpus}", markup=False)
    console.print(_held(plan))
    console.print(_phases(plan))
    console.print(_sync(plan))
    console.print(_times(plan))
    console.print(_notes(plan), markup=False)


def new_table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def _held(plan: RunPlan) -> Table:
    """One line per pipeline stage: its fullest rank."""
    counted = all(stage.is_counted for stage in plan.stages)
    title = "Memory per rank, GB" + ("" if counted else " (activations by formula)")
    headings = ("stage", "ranks", "weights", "gradients", "optimizer", "activations", "by formula")
    table = new_table(title, *headings)
    for number, stage in enumerate(plan.stages):
        ranks = [rank for rank in plan.ranks if rank.pp_rank == number]
        fullest = max(ranks, key=lambda rank: rank.static)
        sizes = (fullest.parameters, fullest.gradients, fullest.optimizer, stage.peak, stage.textbook)
        table.add_row(str(number), str(len(ranks)), *map(_gb, sizes))
    return table


def _phases(plan: RunPlan) -> Table:
    table = new_table("Peak memory per GPU, GB", "phase", "fullest rank", "mean of ranks", "free")
    for name, label in (("sync", "weight sync"), ("drawing", "generation"), ("training", "training")):
        sizes = [_size(phases, name) for phases in plan.phases]
        free = plan.job.gpu.memory - max(sizes)
        table.add_row(label, *map(_gb, (max(sizes), sum(sizes) / len(sizes), free)))
    return table


def _gb(size: float) -> str:
    """Gigabytes, with three digits."""
    return f"{size / GB:.1f}" if abs(size) >= 99.95 * GB else f"{size / GB:.3g}"


def _size(phases: Phases, name: str) -> int:
    return int(getattr(phases, name))


def _sync(plan: RunPlan) -> Table:
    sync = plan.sync
    nvlink = [traffic.nvlink for traffic in sync.received]
    network = [traffic.network for traffic in sync.received]
    table = new_table("Weight sync", "", "")
    sent = "slices of each rank" if sync.why_full is None else f"full tensors: {sync.why_full}"
    table.add_row("layout", sent)
    table.add_row("tensors, received exactly once by every rank", f"{sync.tensors:,}")
    table.add_row("buckets", f"{len(sync.bucket_bytes)}, {max(sync.bucket_bytes) / 2**20:.0f} MiB at most")
    table.add_row("weights", f"{_gb(sync.total)} GB")
    table.add_row(f"to a rank by NVLink (nodes of {GPUS_PER_NODE})", f"{_gb(max(nvlink))} GB at most")
    table.add_row("to a rank by the network", f"{_gb(max(network))} GB at most")
    table.add_row("seconds", f"{plan.times.sync:.3g}")
    return table


def _times(plan: RunPlan) -> Table:
    times, engine = plan.times, plan.engine
    table = new_table("Time per step, s", "phase", "seconds", "share")
    for label, seconds in (
        ("generation", times.generation),
        ("weight sync", times.sync),
        ("optimizer to host memory and back", times.turns),
        *([("optimizer step in host memory", times.host_step)] if times.host_step else []),
        ("training", times.training),
        ("rewards, exchange of samples, digests, files", times.bookkeeping),
        ("everything else (fitted)", times.other),
        ("step", times.step),
    ):
        table.add_row(label, f"{seconds:.3g}", f"{seconds / times.step:.0%}")
    table.caption = (
        f"{times.tokens_per_gpu:,.0f} tokens/s/GPU ({times.training_tokens_per_gpu:,.0f} while training); "
        f"{plan.gpu_hours:,.0f} GPU-hours for {plan.job.config.train.steps} steps; "
        f"{engine.engines} engines of {engine.tensor_parallel_size} GPUs"
    )
    table.caption_justify = "left"
    return table


def _notes(plan: RunPlan) -> str:
    job, lengths, engine = plan.job, plan.job.lengths, plan.engine
    lines = [
        f"Assumed: prompts of {lengths.prompt:.0f} tokens and responses of {lengths.response:.0f} on average "
        "(--mean-response); memory is for the longest of both.",
        f"{plan.micro_batches} micro-batches per data-parallel rank; {plan.padding:.1%} of their tokens are "
        f"padding (policy.packing={job.config.policy.packing.value}).",
        "Bytes are counted; times are modelled, without evaluations and checkpoints; --json prints every "
        "constant with its source.",
    ]
    if not all(stage.is_counted for stage in plan.stages):
        lines.append(
            "Activations are by formula, as if every expert took the same number of tokens; a rank whose "
            "experts take more needs more."
        )
    if (host := max(rank.host_optimizer for rank in plan.ranks)) > 0:
        # The gradients in transit take 4 bytes for every 12 of the optimizer.
        lines.append(
            f"policy.optimizer_offload={job.config.policy.optimizer_offload:g} takes "
            f"{_gb(host * 16 / 12 * GPUS_PER_NODE)} GB of host memory on a node of {GPUS_PER_NODE}."
        )
    if engine.token and engine.cache:
        lines.insert(
            1,
            f"An engine's KV cache holds {engine.cached_tokens:,} tokens ({engine.token:,} bytes each per "
            f"GPU) for {engine.running:,} responses.",
        )
    return "\n".join(lines)
