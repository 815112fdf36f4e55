"""Updates of the objectives that OPO is compared with, on the same policy.

Beyond OPO's one update they may take forward passes, which follow from the objective's row of the table
(`algorithm/objectives/table.py`), and several optimizer steps, each on its own mini-batch of prompts; after
the first one the samples are off-policy.
"""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from opo_megatron.algorithm.config import LossNormalizer
from opo_megatron.algorithm.objective import Objective, loss_normalizer
from opo_megatron.algorithm.objectives.build import build_objective
from opo_megatron.algorithm.objectives.table import SPECS, passes_of
from opo_megatron.algorithm.objectives.tokens import Derives
from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.redistribute import redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.run import Run
from opo_megatron.updates.derived_columns import derived_columns
from opo_megatron.updates.engine_mismatch import engine_mismatch
from opo_megatron.updates.staleness import set_proximal


def off_policy_updates(
    run: Run, step: int, rollouts: Rollouts, stats: BatchStats, advantages: Tensor, lr: float
) -> StepMetrics:
    """`algorithm.updates_per_batch` optimizer steps; returns the means of their metrics.

    Before the first one it is proven that engine and policy agree: by the old log-probabilities, over all
    tokens, or without them by the forward pass of the first update, over its tokens.  Stale rollouts were
    checked when they were sampled: for them the mismatch is the policy's distance before the first update.
    """
    config, policy, algorithm = run.config, run.policy, run.config.algorithm
    passes = passes_of(algorithm)
    mini_batches = split_prompts(stats.groups, algorithm.updates_per_batch, f"{config.run.seed}/{step}")
    schedules = [policy.schedule(stats.sequence_lengths, only=part) for part in mini_batches]
    parts = [redistribute_to_dp(run.parallel, rollouts, schedule, len(advantages)) for schedule in schedules]
    before_update = None
    if passes.old:
        set_old_log_probs(run, parts, schedules)
        mismatch = engine_mismatch(run.parallel, parts, run.parallel.is_dp_leader)
        before_update = StepMetrics(0.0, int(stats.response_lengths.sum()), None, mismatch)
        run.check_on_policy(before_update)
    if passes.reference:
        _measure_reference(run, parts, schedules)
    found: list[StepMetrics] = []
    for part, schedule, samples in zip(parts, schedules, mini_batches, strict=True):
        objective = _objective(run, stats, samples)
        _derive(run, part, schedule, stats, samples, objective)
        is_first = before_update is None and not found
        found.append(
            policy.train_step(part, schedule, objective, lr, run.check_on_policy if is_first else None)
        )
    entropies = [one.entropy for one in found if one.entropy is not None]
    return replace(
        found[0] if before_update is None or config.rollout.staleness else before_update,
        tokens=int(stats.response_lengths.sum()),
        loss=fmean(one.loss for one in found),
        entropy=fmean(entropies) if entropies else None,
        grad_norm=fmean(one.grad_norm for one in found),
    )


def split_prompts(groups: Tensor, parts: int, seed: str) -> list[list[int]]:
    """Samples of `parts` equally many prompts each, a function of the arguments alone."""
    prompts = groups.unique().tolist()
    if parts > 1:
        random.Random(seed).shuffle(prompts)
    size = len(prompts) // parts
    mini_batches = [set(prompts[i * size : (i + 1) * size]) for i in range(parts)]
    return [[i for i, group in enumerate(groups.tolist()) if group in chosen] for chosen in mini_batches]


def set_old_log_probs(run: Run, parts: list[Rollouts], schedules: list[MicroBatchPlan]) -> None:
    """Set o, log π of the policy before the first update, of all tokens of this rank's replica.

    Stale rollouts have that of the policy that sampled them, or what `algorithm.proximal` says.
    """
    if run.config.rollout.staleness:
        set_proximal(run, parts, schedules)
        return
    for part, schedule in zip(parts, schedules, strict=True):
        part.old_log_prob = run.policy.log_probs(part, schedule, run.config.rollout.temperature)


def _objective(run: Run, stats: BatchStats, samples: list[int]) -> Objective:
    """The objective of an update on `samples`."""
    algorithm = run.config.algorithm
    normalizer = loss_normalizer(algorithm, stats.response_lengths[torch.tensor(samples)])
    if algorithm.loss_normalizer is LossNormalizer.constant:
        normalizer /= algorithm.updates_per_batch
    return build_objective(algorithm, normalizer, run.config.rollout.temperature)


def _derive(
    run: Run,
    part: Rollouts,
    schedule: MicroBatchPlan,
    stats: BatchStats,
    samples: list[int],
    objective: Objective,
) -> None:
    """Set the columns that have to be known before the gradient of the next update."""
    spec = SPECS[run.config.algorithm.objective]
    if passes_of(run.config.algorithm).current:
        part.current_log_prob = run.policy.log_probs(part, schedule, run.config.rollout.temperature)
    if spec.derived_over is not None:
        assert isinstance(objective, Derives)
        part.derived = derived_columns(run.parallel, spec, objective, part, schedule, stats, samples)


def _measure_reference(run: Run, parts: list[Rollouts], schedules: list[MicroBatchPlan]) -> None:
    """Log-probabilities under the reference weights, of which this rank keeps its part on the host."""
    assert run.reference_weights is not None
    if run.reference_params is None:
        run.reference_params = run.policy.shards_of(run.reference_weights)
    with run.policy.swap_weights(run.reference_params):
        for part, schedule in zip(parts, schedules, strict=True):
            part.reference_log_prob = run.policy.log_probs(part, schedule, run.config.rollout.temperature)
