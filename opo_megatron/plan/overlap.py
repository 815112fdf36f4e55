"""A step that overlaps training with generation, simulated from lengths: how many nodes should serve?

Engines decode their block of the samples with a number of slots; a response that ends frees its slot for the
next.  The trainer takes complete groups in parts, as `batch/group_ledger.py` gives them out, one after the
other.  Three ways to use the same GPUs:

    together    all generate, then all train
    apart       some generate, then the others train
    overlapped  some generate while the others train on what is complete

Losses that the planner does not count (`step_overhead`) multiply generation and training alike, so they
change none of the ratios.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

from opo_megatron.config.arithmetic import model_parallel_size
from opo_megatron.config.schema import PolicyConfig
from opo_megatron.errors import UserError
from opo_megatron.plan.hardware import GPUS_PER_NODE, constant
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.plan import RunPlan
from opo_megatron.plan.times import (
    Work,
    decode_seconds,
    generation_seconds,
    prefill_seconds,
    training_seconds,
)

CACHE_SHARE = 0.9
"""Of an engine's GPU for weights and cache, where it has the GPU for itself."""
SPREAD = 0.8
"""Standard deviation of the logarithm of lengths, where none are given."""

Decode = Callable[[int, int], float]
"""(responses that run, their cached tokens) → seconds of one decoding step."""


@dataclass(frozen=True)
class Part:
    """A part of the batch on the trainer, in seconds since the step began."""

    start: float
    end: float
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    ends: tuple[float, ...]
    """When each response ends."""
    parts: tuple[Part, ...]

    @property
    def generation(self) -> float:
        return max(self.ends)

    @property
    def training(self) -> float:
        return sum(part.end - part.start for part in self.parts)

    @property
    def step(self) -> float:
        return self.parts[-1].end


def decoded(responses: Sequence[int], prompt: int, slots: int, decode: Decode) -> list[float]:
    """When each response of one engine ends; it admits them in order as slots become free."""
    ends = [0.0] * len(responses)
    seconds, clock, cached, waiting = 0.0, 0, 0, 0
    running: list[tuple[int, int]] = []  # (decoding step at which it ends, response)
    while waiting < len(responses) or running:
        while waiting < len(responses) and len(running) < slots:
            heapq.heappush(running, (clock + responses[waiting], waiting))
            cached += prompt
            waiting += 1
        steps = running[0][0] - clock
        # The cache grows by a token per response and step: its mean over these steps.
        seconds += steps * decode(len(running), cached + len(running) * steps // 2)
        clock += steps
        cached += len(running) * steps
        while running and running[0][0] == clock:
            _, response = heapq.heappop(running)
            ends[response] = seconds
            cached -= prompt + responses[response]
    return ends


def simulate(
    responses: Sequence[int],
    samples_per_prompt: int,
    prompt: int,
    engines: int,
    slots: int,
    decode: Decode,
    train: Callable[[int], float],
    least_tokens: int,
    began: float = 0.0,
    overlaps: bool = True,
) -> Timeline:
    """One step.

    Args:
        responses: lengths of all samples, group by group.
        prompt: tokens of every prompt.
        slots: responses that an engine runs at once.
        train: seconds of a part with this many tokens.
        least_tokens: of a part.
        began: seconds until the engines decode.
        overlaps: whether parts are trained on before the last response has ended.
    """
    total = len(responses)
    blocks = [range(total * e // engines, total * (e + 1) // engines) for e in range(engines)]
    ends = [
        began + end for b in blocks for end in decoded(responses[b.start : b.stop], prompt, slots, decode)
    ]
    k = samples_per_prompt
    complete = [max(ends[g * k : (g + 1) * k]) for g in range(total // k)]
    tokens = [sum(responses[g * k : (g + 1) * k]) + k * prompt for g in range(total // k)]
    order = sorted(range(len(complete)), key=lambda g: complete[g])
    last, now, parts, done = max(ends), 0.0, [], 0
    while done < len(order):
        ready, size = done, 0
        while ready < len(order) and (size < least_tokens or complete[order[ready]] <= now):
            size += tokens[order[ready]]
            ready += 1
        if not overlaps:
            ready = len(order)
            size = sum(tokens)
        chosen = order[done:ready]
        start = max(now, *(complete[g] for g in chosen), last if not overlaps else 0.0)
        now = start + train(size)
        parts.append(Part(start, now, tuple(chosen)))
        done = ready
    return Timeline(tuple(ends), tuple(parts))


def log_normal(lengths: Lengths, samples_per_prompt: int, spread: float = SPREAD, seed: int = 1) -> list[int]:
    """Lengths of a step's responses in random order: quantiles with the mean of `lengths`, truncated."""
    normal, n = NormalDist(), lengths.samples // samples_per_prompt * samples_per_prompt
    points = [math.exp(spread * normal.inv_cdf((i + 0.5) / n)) for i in range(n)]

    def scaled(scale: float) -> list[int]:
        return [max(1, min(lengths.longest_response, round(scale * point))) for point in points]

    low, high = 1e-3, 1e3 * lengths.longest_response
    for _ in range(60):
        middle = math.sqrt(low * high)
        if sum(scaled(middle)) / n < lengths.response:
            low = middle
        else:
            high = middle
    result = scaled(low)
    random.Random(seed).shuffle(result)
    return result


def lengths_of_run(run_dir: Path) -> list[int]:
    """Response lengths of a run's last rollout file.

    Raises:
        UserError: where it has none.
    """
    from opo_megatron.batch.rollouts import Rollouts

    files = sorted((run_dir / "rollouts").glob("step_*.safetensors"))
    if not files:
        raise UserError(
            f"--lengths {run_dir} has no rollouts/step_*.safetensors; name the folder of a run with "
            "observe.save_rollouts=true"
        )
    lengths: list[int] = Rollouts.load(files[-1]).response_lengths.tolist()
    return lengths


@dataclass(frozen=True)
class Split:
    """GPUs that serve and GPUs that train, and the seconds of a step, weight sync aside."""

    serving: int
    training: int
    apart: float
    overlapped: Timeline


def split(work: Work, policy: PolicyConfig, parts: int, serving: int, responses: Sequence[int]) -> Split:
    """A step with `serving` of the GPUs as engines and the others as trainer.

    Args:
        parts: micro-batches of a part, `rollout.overlap_micro_batches`.
        responses: lengths of all samples, group by group.
    """
    engines, training = max(1, serving // work.engine_tp), work.gpus - serving
    replicas = training // model_parallel_size(policy)
    per_token = training_seconds(replace(work, gpus=training, bubble=0.0)) / work.trained_tokens
    micro_batch = policy.max_tokens_per_micro_batch * replicas
    chunks = policy.virtual_pipeline_model_parallel_size or 1
    # Every part fills and drains the pipeline.
    fill = (policy.pipeline_model_parallel_size - 1) / chunks * micro_batch * per_token
    samples = work.samples_per_prompt
    mean = work.lengths.prompt + work.lengths.response
    cache = work.gpu.memory * CACHE_SHARE - constant("reserved") - work.engine_weights
    slots = max(1, int(cache / (mean * work.engine_token)))

    def run(overlaps: bool) -> Timeline:
        return simulate(
            responses, samples, round(work.lengths.prompt), engines, slots,
            lambda rows, cached: decode_seconds(work, rows, cached),
            lambda tokens: tokens * per_token + fill, parts * micro_batch,
            prefill_seconds(work, serving), overlaps,
        )  # fmt: skip

    return Split(serving, training, run(overlaps=False).step, run(overlaps=True))


def splits(plan: RunPlan, responses: Sequence[int] | None) -> list[Split]:
    """Every division of the GPUs by whole nodes, the fastest overlapped step first.

    Args:
        responses: lengths of a step's samples; default log-normal ones with the plan's mean.
    """
    config, work = plan.job.config, plan.work
    assert config.rollout.overlap_micro_batches is not None
    if responses is None:
        responses = log_normal(work.lengths, config.rollout.samples_per_prompt)
    unit = GPUS_PER_NODE if work.gpus % GPUS_PER_NODE == 0 and work.gpus > GPUS_PER_NODE else work.engine_tp
    found = [
        split(work, config.policy, config.rollout.overlap_micro_batches, serving, responses)
        for serving in range(unit, work.gpus, unit)
        if (work.gpus - serving) % model_parallel_size(config.policy) == 0
    ]
    return sorted(found, key=lambda one: one.overlapped.step)


def together(work: Work) -> float:
    """Seconds of a step in which all GPUs generate, then all train."""
    return generation_seconds(work) + training_seconds(work)
