"""A step's samples: responses from the current policy, their rewards, and what the baseline needs besides.

With `rollout.fill=groups_with_signal` step s owns a fixed block of `fill_rounds` × `prompts_per_step`
prompts.  They are sampled in rounds of `prompts_per_step` whole groups, in the order of the block, all with
the weights of the step.  The batch is the first `prompts_per_step` groups whose rewards are not all equal;
where the block has fewer, the first groups without signal complete it, whose gradient is 0.  Which groups
these are depends on order and rewards alone, never on which response is finished first; and it is a function
of (seed, step), so a resumed run takes the same ones.

What it does to the gradient: with prompts sampled independently every group taken is a sample of the
distribution of groups with signal, so that the expectation is that of plain sampling times a constant (with
a constant normalizer).  A run reads a permutation of its prompts instead, in which the prompts before a group
say something of those after it: a deviation of O(1 / number of prompts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opo_megatron.algorithm.advantages import zero_variance
from opo_megatron.algorithm.config import Center
from opo_megatron.algorithm.on_policy import check_versions
from opo_megatron.batch.redistribute import exchange_blocks
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, gather_stats
from opo_megatron.config.choices import Fill
from opo_megatron.distributed.process_groups import all_gather_objects, rank_range
from opo_megatron.observe.timing import PhaseTimer
from opo_megatron.rollout.requests import (
    compute_rewards,
    greedy_sampling,
    requests_for,
    training_sampling,
)
from opo_megatron.run import Run
from opo_megatron.tasks import Prompt


def sample_batch(run: Run, step: int, timer: PhaseTimer) -> tuple[Rollouts, BatchStats]:
    """This rank's part of the step's samples with their rewards, and the statistics of all; a collective."""
    rollout = run.config.rollout
    prompts = run.prompts(step)
    rounds = [
        range(first, first + rollout.prompts_per_step)
        for first in range(0, len(prompts), rollout.prompts_per_step)
    ]
    rollouts, stats = _sample_round(run, step, timer, prompts, rounds[0])
    if rollout.fill is Fill.groups_with_signal:
        parts = [(rollouts, stats)]
        while len(parts) < len(rounds) and _with_signal(run, parts) < rollout.prompts_per_step:
            parts.append(_sample_round(run, step, timer, prompts, rounds[len(parts)]))
        rollouts, stats = _taken(run, parts)
    if run.config.algorithm.center is Center.greedy:
        stats = replace(stats, greedy_rewards=_greedy_rewards(run, step, timer, prompts, stats.groups))
    with timer.phase("reward"):
        return rollouts, run.generation.with_energies(rollouts, stats)


def _sample_round(
    run: Run, step: int, timer: PhaseTimer, prompts: Sequence[Prompt], groups: range
) -> tuple[Rollouts, BatchStats]:
    """K responses to each of the prompts `groups`, and their rewards."""
    config, parallel = run.config, run.parallel
    with timer.phase("rollout"):
        requests = requests_for(prompts, config.rollout.samples_per_prompt, parallel, groups)
        sampling = training_sampling(config, run.task, step)
        rollouts = run.generation.generate(
            requests, sampling, f"step {step}  generating", interruptible=True, prompts=prompts
        )
        run.last_rollouts = rollouts
        check_versions(rollouts.weight_versions, run.policy.version)
    with timer.phase("reward"):
        rollouts.rewards = compute_rewards(run.task, prompts, rollouts)
        return rollouts, gather_stats(parallel, rollouts)


# ---------------------------------------------------------------------- groups with signal


def _with_signal(run: Run, parts: Sequence[tuple[Rollouts, BatchStats]]) -> int:
    """Number of groups so far whose rewards are not all equal."""
    return sum(len(stats.groups[~_zero_variance(run, stats)].unique()) for _, stats in parts)


def _zero_variance(run: Run, stats: BatchStats) -> Tensor:
    return zero_variance(run.config.algorithm, stats.rewards, stats.groups)


def choose_groups(groups: Tensor, is_zero_variance: Tensor, count: int) -> list[int]:
    """The first `count` groups with signal, in order; then those without, where there are fewer.

    Args:
        groups: [N] int64 of all samples.
        is_zero_variance: [N] bool, the same for all samples of a group.
    """
    with_signal = groups[~is_zero_variance].unique().tolist()[:count]
    without = groups[is_zero_variance].unique().tolist()[: count - len(with_signal)]
    return sorted((*with_signal, *without))


def _taken(run: Run, parts: Sequence[tuple[Rollouts, BatchStats]]) -> tuple[Rollouts, BatchStats]:
    """The groups of all rounds that the step trains on, renumbered from 0 and divided over ranks as usual."""
    count = run.config.rollout.prompts_per_step
    groups = torch.cat([stats.groups for _, stats in parts])
    is_zero = torch.cat([_zero_variance(run, stats) for _, stats in parts])
    chosen = choose_groups(groups, is_zero, count)
    blocks, total = [], 0
    for _, stats in parts:
        blocks.append(
            [
                range(total + own.start, total + own.stop)
                for own in (
                    rank_range(len(stats.groups), rank, run.parallel.world_size)
                    for rank in range(run.parallel.world_size)
                )
            ]
        )
        total += len(stats.groups)
    held = [[i for block in blocks for i in block[rank]] for rank in range(run.parallel.world_size)]
    samples = torch.isin(groups, torch.tensor(chosen)).nonzero()[:, 0].tolist()
    rollouts = Rollouts.concatenate([rollouts for rollouts, _ in parts])
    rollouts = exchange_blocks(run.parallel, rollouts, held, samples)
    rollouts.groups = torch.searchsorted(torch.tensor(chosen), rollouts.groups)
    run.last_rollouts = rollouts
    taken = gather_stats(run.parallel, rollouts)
    rewards = torch.cat([stats.rewards for _, stats in parts])
    return rollouts, replace(
        taken, sampled_groups=len(groups.unique()), sampled_reward=float(rewards.mean()), rounds=len(parts)
    )


# ---------------------------------------------------------------------- greedy responses


def _greedy_rewards(
    run: Run, step: int, timer: PhaseTimer, prompts: Sequence[Prompt], groups: Tensor
) -> Tensor:
    """[N] reward of the greedy response to each sample's prompt: one more request per prompt."""
    with timer.phase("rollout"):
        requests = requests_for(prompts, 1, run.parallel)
        greedy = run.generation.generate(
            requests,
            greedy_sampling(run.config, run.task, step),
            f"step {step}  greedy",
            interruptible=True,
            prompts=prompts,
        )
        check_versions(greedy.weight_versions, run.policy.version)
    with timer.phase("reward"):
        own = compute_rewards(run.task, prompts, greedy)
        return torch.cat(all_gather_objects(run.parallel, own))[groups]
