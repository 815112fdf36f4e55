"""A step that also trains on responses of earlier steps (`rollout.replay`), for comparison with OPO.

The step's own responses have OPO's gradient, which is that of a clipped objective at ratio 1.  Replayed ones
have the clipped objective, with the engine's log-probabilities of their sampling as old ones; the on-policy
check of their step has shown that the policy's were the same.  `repo` adds the two gradients and takes one
optimizer step; `spear` takes one more on the replayed responses, where its authors take one per mini-batch.

The formulas are in `algorithm/experience_replay.py`.  Rank 0 keeps the buffer, and its choice is a function
of (seed, step) and of what it holds: a resumed run replays the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opo_megatron.algorithm.experience_replay import median, ramp, repo_advantages, spear_advantages
from opo_megatron.algorithm.objective import PolicyGradient, loss_normalizer
from opo_megatron.algorithm.objectives.clipped import Clipped
from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.redistribute import gather_to_rank0, redistribute_to_dp, scatter_from_rank0
from opo_megatron.batch.replay_buffer import (
    added,
    choose_at_random,
    choose_per_prompt,
    newest_per_prompt,
    without_older,
)
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.config.choices import ReplayMethod
from opo_megatron.distributed.process_groups import all_gather_objects
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.policy.metric_sums import MetricSums, StepMetrics
from opo_megatron.run import Run
from opo_megatron.updates.opo import opo_part

HISTORY = "replay_history"
"""Key of the mean rewards of earlier groups, and of their deviations, in the state of a run."""
ENOUGH = 1.5
"""spear: a replay needs this many times `size` good samples, of which some are dropped."""

Part = tuple[Rollouts, MicroBatchPlan, Clipped]
OwnPart = tuple[Rollouts, MicroBatchPlan, PolicyGradient]


def replay_update(
    run: Run, step: int, rollouts: Rollouts, stats: BatchStats, advantages: Tensor, lr: float
) -> tuple[StepMetrics, MetricsRow]:
    """The step's update with what is replayed, and the buffer after it; a collective.

    Returns:
        Metrics of the step's own samples, and a row of those replayed.
    """
    replay, kept = run.config.rollout.replay, run.saver.kept
    prompts = _prompts(run, rollouts)
    if kept.buffer is not None:
        kept.buffer = without_older(kept.buffer, step, replay.max_age)
    replayed = _on_this_rank(run, _chosen(run, step, prompts))
    own = opo_part(run, rollouts, stats, advantages)
    row: MetricsRow = {"replay/samples": 0}
    if replayed is None:
        metrics = run.policy.train_step(*own, lr, run.check_on_policy)
    else:
        coefficient = replay.coefficient * ramp(step, replay.ramp_steps or 0)
        part, row = _replayed_part(run, step, replayed, coefficient)
        if replay.method is ReplayMethod.repo:
            metrics, found = _joint_step(run, own, part, lr)
        else:
            metrics = run.policy.train_step(*own, lr, run.check_on_policy)
            found = run.policy.train_step(*part, lr)
        row |= {"replay/loss": found.loss}
        if found.mismatch is not None:
            row |= {"off_policy/k3": found.mismatch.k3, "off_policy/ess": found.mismatch.ess}
    _remember(run, step, gather_to_rank0(run.parallel, rollouts))
    return metrics, row | {"replay/buffer": all_gather_objects(run.parallel, _size(kept.buffer))[0]}


# ---------------------------------------------------------------------- which samples


def _prompts(run: Run, rollouts: Rollouts) -> list[int]:
    """The prompts of the step, in its order, each once."""
    ranks = all_gather_objects(run.parallel, rollouts.prompt_ids.tolist())
    return list(dict.fromkeys(prompt for prompts in ranks for prompt in prompts))


def _chosen(run: Run, step: int, prompts: list[int]) -> Rollouts | None:
    """On rank 0 the samples to replay, with their advantages; None elsewhere and where there are none."""
    replay, buffer = run.config.rollout.replay, run.saver.kept.buffer
    if buffer is None or not len(buffer):
        return None
    seed = f"{run.config.run.seed}/{step}"
    if replay.method is ReplayMethod.repo:
        groups = choose_per_prompt(buffer, prompts, replay, seed)
        if not groups:
            return None
        chosen = buffer.select([i for group in groups for i in group])
        assert chosen.rewards is not None
        return replace(chosen, advantages=repo_advantages(chosen.rewards.view(len(groups), -1)).flatten())
    return _good_samples(run, buffer, seed)


def _good_samples(run: Run, buffer: Rollouts, seed: str) -> Rollouts | None:
    """spear: a random part of the buffer's good samples, once there are enough; the buffer is empty then."""
    replay, history = run.config.rollout.replay, run.saver.state[HISTORY]
    assert replay.size is not None and buffer.rewards is not None
    means = [mean for _, means, _ in history for mean in means]
    if int((buffer.rewards > median(means)).sum()) <= ENOUGH * replay.size:
        return None
    deviations = [one for _, _, deviations in history for one in deviations]
    advantages = spear_advantages(buffer.rewards, means, deviations if replay.divide_by_std else None)
    good = (advantages > 0).nonzero()[:, 0].tolist()
    chosen = choose_at_random(good, replay.size, seed)
    run.saver.kept.buffer = buffer.select([])
    return replace(buffer.select(chosen), advantages=advantages[chosen]) if chosen else None


def _on_this_rank(run: Run, chosen: Rollouts | None) -> Rollouts | None:
    """This rank's block of rank 0's choice; None on all ranks where it has chosen none."""
    if not all_gather_objects(run.parallel, _size(chosen))[0]:
        return None
    return scatter_from_rank0(run.parallel, chosen)


def _size(rollouts: Rollouts | None) -> int:
    return 0 if rollouts is None else len(rollouts)


# ---------------------------------------------------------------------- the update


def _replayed_part(run: Run, step: int, replayed: Rollouts, coefficient: float) -> tuple[Part, MetricsRow]:
    """What the gradient of the replayed samples is computed from, and their metrics."""
    algorithm, temperature = run.config.algorithm, run.config.rollout.temperature
    replayed.old_log_prob = replayed.engine_log_prob
    columns = (
        replayed.sequence_lengths, replayed.response_lengths, replayed.rewards, replayed.sampled_in
    )  # fmt: skip
    gathered = zip(*all_gather_objects(run.parallel, columns), strict=True)
    sequences, responses, rewards, sampled_in = (torch.cat(parts) for parts in gathered)
    schedule = run.policy.schedule(sequences)
    samples = redistribute_to_dp(run.parallel, replayed, schedule, len(sequences))
    normalizer = loss_normalizer(algorithm, responses) / coefficient
    objective = Clipped(normalizer, temperature, algorithm.clip_low, algorithm.clip_high)
    return (samples, schedule, objective), {
        "replay/samples": len(sequences),
        "replay/reward_mean": float(rewards.mean()),
        "replay/age_mean": float(step - sampled_in.double().mean()),
        "replay/age_max": step - int(sampled_in.min()),
        "replay/coefficient": coefficient,
    }


def _joint_step(run: Run, own: OwnPart, part: Part, lr: float) -> tuple[StepMetrics, StepMetrics]:
    """One optimizer step on the sum of both gradients; the metrics of either part."""
    policy = run.policy
    sums = policy.begin_gradients(measures_mismatch=True)
    policy.add_gradients(*own, sums)
    sums_of_replayed = MetricSums(policy.parallel.device, measures_mismatch=True)
    policy.add_gradients(*part, sums_of_replayed)
    found = sums_of_replayed.total(policy.parallel, part[0].response_lengths)
    return policy.finish_streamed_step(sums, 1.0, own[0].response_lengths, lr, run.check_on_policy), found


# ---------------------------------------------------------------------- what is kept


def _remember(run: Run, step: int, rollouts: Rollouts | None) -> None:
    """Keep the step's samples on rank 0, all or the good ones, and the history of its groups on all ranks."""
    replay, kept = run.config.rollout.replay, run.saver.kept
    history = None
    if rollouts is not None:
        assert rollouts.rewards is not None and rollouts.advantages is not None
        if replay.method is ReplayMethod.repo:
            assert replay.size is not None
            kept.buffer = newest_per_prompt(added(kept.buffer, rollouts, step), replay.size)
        else:
            good = (rollouts.advantages > 0).nonzero()[:, 0]
            kept.buffer = added(kept.buffer, rollouts.select(good), step)
            history = _history(run, step, rollouts)
    if replay.method is ReplayMethod.spear:
        run.saver.state[HISTORY] = all_gather_objects(run.parallel, history)[0]


def _history(run: Run, step: int, rollouts: Rollouts) -> list[Any]:
    """[step, means, population deviations] of the groups of each step, up to `history` groups before this."""
    assert rollouts.rewards is not None
    history = list(run.saver.state.get(HISTORY, []))
    while history and sum(len(means) for _, means, _ in history) > run.config.rollout.replay.history:
        history.pop(0)
    groups = [rollouts.rewards[rollouts.groups == group] for group in rollouts.groups.unique()]
    means = [float(group.mean()) for group in groups]
    return [*history, [step, means, [float(group.std(correction=0)) for group in groups]]]
