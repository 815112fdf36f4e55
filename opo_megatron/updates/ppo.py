"""Updates of PPO and GRPO, with a clipped ratio, on the same policy, for comparison with OPO.

Beyond OPO's one update they take a forward pass for old log-probabilities, one for reference log-probs where
the objective has a KL, and several optimizer steps, each on its own mini-batch of prompts; after the first
one the samples are off-policy.
"""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.config import LossNormalizer
from opo_megatron.algorithm.objective import Clipped, loss_normalizer
from opo_megatron.algorithm.on_policy import Mismatch, MismatchSums
from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.redistribute import redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.run import Run
from opo_megatron.updates.staleness import set_proximal


def ppo_updates(
    run: Run, step: int, rollouts: Rollouts, stats: BatchStats, advantages: Tensor, lr: float
) -> StepMetrics:
    """`algorithm.updates_per_batch` optimizer steps; returns the means of their metrics.

    The old log-probabilities prove, before the first step, that engine and policy agree.
    """
    config, policy, algorithm = run.config, run.policy, run.config.algorithm
    mini_batches = split_prompts(stats.groups, algorithm.updates_per_batch, f"{config.run.seed}/{step}")
    schedules = [policy.schedule(stats.sequence_lengths, only=part) for part in mini_batches]
    parts = [redistribute_to_dp(run.parallel, rollouts, schedule, len(advantages)) for schedule in schedules]
    temperature = config.rollout.temperature
    if config.rollout.staleness:
        set_proximal(run, parts, schedules)
    else:
        for part, schedule in zip(parts, schedules, strict=True):
            part.old_log_prob = policy.log_probs(part, schedule, temperature)
    mismatch = _mismatch(run.parallel, parts)
    before_update = StepMetrics(0.0, int(stats.response_lengths.sum()), None, mismatch)
    run.check_on_policy(before_update)
    if algorithm.kl_coefficient:
        _measure_reference(run, parts, schedules, temperature)
    found = []
    for part, schedule, samples in zip(parts, schedules, mini_batches, strict=True):
        normalizer = loss_normalizer(algorithm, stats.response_lengths[torch.tensor(samples)])
        if algorithm.loss_normalizer is LossNormalizer.constant:
            normalizer /= algorithm.updates_per_batch
        objective = Clipped(
            normalizer, temperature, algorithm.clip_low, algorithm.clip_high, algorithm.kl_coefficient
        )
        found.append(policy.train_step(part, schedule, objective, lr))
    entropies = [one.entropy for one in found if one.entropy is not None]
    return replace(
        before_update,
        loss=fmean(one.loss for one in found),
        entropy=fmean(entropies) if entropies else None,
        grad_norm=fmean(one.grad_norm for one in found),
        mismatch=found[0].mismatch if config.rollout.staleness else mismatch,
    )


def split_prompts(groups: Tensor, parts: int, seed: str) -> list[list[int]]:
    """Samples of `parts` equally many prompts each, a function of the arguments alone."""
    prompts = groups.unique().tolist()
    if parts > 1:
        random.Random(seed).shuffle(prompts)
    size = len(prompts) // parts
    mini_batches = [set(prompts[i * size : (i + 1) * size]) for i in range(parts)]
    return [[i for i, group in enumerate(groups.tolist()) if group in chosen] for chosen in mini_batches]


def _mismatch(parallel: Parallel, parts: list[Rollouts]) -> Mismatch | None:
    """Old log-probabilities against the engine's, over all tokens of all ranks."""
    sums, tokens = MismatchSums(torch.device("cpu")), 0
    for part in parts:
        if part.engine_log_prob is None or part.old_log_prob is None:
            return None
        if part.old_log_prob.numel():
            sums.add(part.old_log_prob - part.engine_log_prob)
        tokens += part.old_log_prob.numel()
    mine = torch.cat((sums.values, torch.tensor([float(tokens)], dtype=torch.float64)))
    *values, count = all_reduce(parallel, mine * float(parallel.is_dp_leader)).tolist()
    highest = all_reduce(parallel, sums.highest, dist.ReduceOp.MAX)
    return MismatchSums.result(values, float(highest), count) if count else None


def _measure_reference(
    run: Run, parts: list[Rollouts], schedules: list[MicroBatchPlan], temperature: float
) -> None:
    """Log-probabilities under the reference weights, of which this rank keeps its part on the host."""
    assert run.reference_weights is not None
    if run.reference_params is None:
        run.reference_params = run.policy.shards_of(run.reference_weights)
    with run.policy.swap_weights(run.reference_params):
        for part, schedule in zip(parts, schedules, strict=True):
            part.reference_log_prob = run.policy.log_probs(part, schedule, temperature)
