"""The nearest layout that fits: the first of a short list, cheapest changes first.

Recomputation costs a third of training time; smaller micro-batches cost efficiency; a larger engine costs
communication during generation; more tensor or pipeline ranks cost data-parallel replicas.  Only the first
and the last pipeline stage are counted; they hold most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opo_megatron.errors import UserError
from opo_megatron.plan.activations import recomputes_all
from opo_megatron.plan.engine import plan_engine
from opo_megatron.plan.hardware import GPUS_PER_NODE, Gpu
from opo_megatron.plan.plan import (
    Job,
    Log,
    Stage,
    count_stage,
    counted_config,
    load_job,
    phases_of,
    problem_of,
)
from opo_megatron.plan.ranks import RankBytes

MAX_TRIES = 12
"""Candidates whose activations are counted."""


def nearest_fit(
    recipe: str, overrides: Sequence[str], job: Job, mean_response: float | None, log: Log
) -> list[str] | None:
    """Overrides with which the recipe fits on the same GPUs; None where none were found."""

    def load(changes: list[str]) -> Job | None:
        try:
            return load_job(recipe, [*overrides, *changes], job.gpus, job.gpu, mean_response)
        except UserError:
            return None  # not a layout of this model

    tries = 0
    for layout in layouts(job):
        if (new_job := load(layout)) is None:
            continue
        log(f"looking for a layout that fits: {' '.join(layout)}", tries / MAX_TRIES)
        held = count_ends(new_job, with_activations=False)
        engine = next(
            (one for one in engines(job) if (new := load([*layout, *one])) and _problem(new, held) is None),
            None,
        )
        if engine is None:
            continue  # does not fit even without activations
        for change in cheap_changes(job):
            candidate = load([*change, *engine, *layout])
            if candidate is not None and _problem(candidate, count_ends(candidate)) is None:
                return [*change, *engine, *layout]
            tries += 1
            if tries == MAX_TRIES:
                return None
    return None


Counted = list[tuple[RankBytes, Stage]]


def count_ends(job: Job, with_activations: bool = True) -> Counted:
    """Count the first rank of the first and of the last pipeline stage, and the latter's last
    context-parallel rank."""
    config = counted_config(job)
    policy = config.policy
    last = job.gpus - job.gpus // policy.pipeline_model_parallel_size
    other = last + policy.tensor_model_parallel_size * (policy.context_parallel_size - 1)
    return [count_stage(job, config, rank, with_activations) for rank in sorted({0, last, other})]


def _problem(job: Job, counted: Counted) -> str | None:
    parameters = max(held.parameters for held, _ in counted)
    engine = plan_engine(job.config, job.vocab_size, job.lengths, job.gpus, job.gpu, parameters)
    return problem_of(job, [phases_of(job, *one, engine) for one in counted], engine)


def cheap_changes(job: Job) -> list[list[str]]:
    """Changes that keep layout and engine, cheapest first; the first is none."""
    longest = job.lengths.longest_prompt + job.lengths.longest_response
    can_be_smaller = job.config.policy.max_tokens_per_micro_batch > longest
    smaller = [f"policy.max_tokens_per_micro_batch={longest}"] if can_be_smaller else []
    recompute = [] if recomputes_all(job.config.policy) else ["policy.recompute=full"]
    changes: list[list[str]] = []
    for change in ([], recompute, smaller, [*recompute, *smaller]):
        if change not in changes:
            changes.append(change)
    return changes


def engines(job: Job) -> Iterator[list[str]]:
    """The recipe's engine, then larger ones."""
    yield []
    size = job.config.rollout.sglang.tensor_parallel_size * 2
    while job.shares_memory and size <= min(GPUS_PER_NODE, job.gpus):
        yield [f"rollout.sglang.tensor_parallel_size={size}"]
        size *= 2


def layouts(job: Job) -> Iterator[list[str]]:
    """The recipe's own, then those with more ranks per model replica, fewest first."""
    policy = job.config.policy
    tensor, pipeline = policy.tensor_model_parallel_size, policy.pipeline_model_parallel_size
    yield []
    pairs = [
        (t, p)
        for t in (1, 2, 4, 8)
        for p in range(1, job.gpus + 1)
        if t * p > tensor * pipeline and job.gpus % (t * p) == 0 and policy.model.num_layers % p == 0
    ]
    for t, p in sorted(pairs, key=lambda pair: (pair[0] * pair[1], abs(pair[0] - tensor))):
        yield [
            f"policy.tensor_model_parallel_size={t}",
            f"policy.sequence_parallel={'true' if t > 1 else 'false'}",
            f"policy.pipeline_model_parallel_size={p}",
            "policy.virtual_pipeline_model_parallel_size=null",
        ]


def gpu_that_fits(job: Job, gpus: dict[str, Gpu]) -> str | None:
    """The name of a GPU with more memory."""
    larger = [name for name, gpu in gpus.items() if gpu.memory > job.gpu.memory]
    return larger[0] if larger else None
