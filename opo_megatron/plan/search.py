"""The layout nearest to a recipe's that fits: the first of a short list, mildest changes first.

Recomputation costs a third of training time and nothing else; smaller micro-batches cost efficiency; a
larger engine costs communication while it draws; more tensor or pipeline ranks cost replicas.  Only the
first and the last pipeline stage are counted, which hold most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opo_megatron.config.keys import key_types
from opo_megatron.errors import UserError
from opo_megatron.plan.engine import plan_engine
from opo_megatron.plan.hardware import GPUS_PER_NODE, Gpu
from opo_megatron.plan.plan import (
    Job,
    Say,
    count_stage,
    counted_config,
    load_job,
    phases_of,
    problem_of,
    recomputes,
)

MOST_TRIES = 12


def nearest_fit(
    recipe: str, overrides: Sequence[str], job: Job, mean_response: float | None, say: Say
) -> list[str] | None:
    """Settings to add to the command so that the recipe fits on the same GPUs; None where none was found."""
    tries = 0
    for changes in candidates(job):
        try:
            candidate = load_job(recipe, [*overrides, *changes], job.gpus, job.gpu, mean_response)
        except UserError:
            continue  # not a layout of this model
        say(f"looking for a layout that fits: {' '.join(changes)}", tries / MOST_TRIES)
        if fits(candidate):
            return changes
        tries += 1
        if tries == MOST_TRIES:
            return None
    return None


def fits(job: Job) -> bool:
    """Whether the first and the last stage have room in every phase."""
    config = counted_config(job)
    last = job.gpus - job.gpus // config.policy.pipeline_model_parallel_size
    counted = [count_stage(job, config, rank) for rank in sorted({0, last})]
    parameters = max(held.parameters for held, _ in counted)
    engine = plan_engine(job.config, job.vocab_size, job.lengths, job.gpus, job.gpu, parameters)
    return problem_of(job, [phases_of(job, *one, engine) for one in counted], engine) is None


def candidates(job: Job) -> Iterator[list[str]]:
    """Changes to a recipe, mildest first."""
    policy, engine = job.config.policy, job.config.rollout.sglang
    mild = [[]] if recomputes(job.config) else [[], recompute_changes()]
    longest = job.lengths.longest_prompt + job.lengths.longest_response
    smaller = [[f"policy.max_tokens_per_micro_batch={longest}"]]
    smaller = smaller if policy.max_tokens_per_micro_batch > longest else []
    engines: list[list[str]] = []
    size = engine.tensor_parallel_size * 2
    while job.shares_memory and size <= min(GPUS_PER_NODE, job.gpus):
        engines.append([f"rollout.sglang.tensor_parallel_size={size}"])
        size *= 2
    for layout in layouts(job):
        for engine_change in ([], *engines):
            for batch in ([], *smaller):
                for change in mild:
                    changes = [*change, *batch, *engine_change, *layout]
                    if changes:
                        yield changes


def layouts(job: Job) -> Iterator[list[str]]:
    """The recipe's own, then those with more ranks per copy of the model, fewest first."""
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


def recompute_changes() -> list[str]:
    """Full recomputation, by the key for it or by Megatron's own names."""
    if "policy.recompute" in key_types():
        return ["policy.recompute=full"]
    fields = {"granularity": "full", "method": "uniform", "num_layers": 1}
    return [f"policy.megatron.recompute_{name}={value}" for name, value in fields.items()]


def gpu_that_fits(job: Job, gpus: dict[str, Gpu]) -> str | None:
    """Another kind of GPU with more memory, by name."""
    larger = [name for name, gpu in gpus.items() if gpu.memory > job.gpu.memory]
    return larger[0] if larger else None
