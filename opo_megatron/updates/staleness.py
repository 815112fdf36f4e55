"""Steps on stale rollouts, on purpose: `rollout.staleness` = k, for comparison with exactly on-policy steps.

Step s trains on the batch that the weights of step s − k sampled, those that k earlier steps have left
behind.  Before step 1 there are only the initial weights: they sample the batches of steps 1 to k + 1, so the
first steps have the ages 0, 1, …, k, min(k, s − 1) in general.  Every step samples one batch, that of step
s + k; k of them wait at any time.  They are part of a checkpoint, and a resumed run trains on the same.

What depends on the weights that sampled a batch is measured while the policy still has them, and waits with
it: rewards, advantages, and by a forward pass the old log-probabilities.  These prove that engine and policy
agreed when the batch was sampled; a token of any other age is refused.  How far the policy has moved since is
in the metrics `off_policy/*`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opo_megatron.algorithm.config import Proximal
from opo_megatron.algorithm.on_policy import Mismatch, check_age
from opo_megatron.algorithm.proximal import loglinear_proximal
from opo_megatron.batch.micro_batch import MicroBatchPlan
from opo_megatron.batch.redistribute import local_slice, redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, gather_stats
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.timing import PhaseTimer
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.policy.token_measures import of_all_tokens
from opo_megatron.run import Run
from opo_megatron.updates.advantages import set_advantages
from opo_megatron.updates.engine_mismatch import engine_mismatch
from opo_megatron.updates.sample_batch import sample_batch
from opo_megatron.updates.variance_report import report_is_due, variance_report

Update = Callable[[Run, int, Rollouts, BatchStats, Tensor, float], StepMetrics]


def stale_update(
    run: Run, step: int, lr: float, timer: PhaseTimer, update: Update
) -> tuple[Rollouts, BatchStats, Tensor, StepMetrics, MetricsRow]:
    """Sample the batch of a later step, and train on the one that has waited for this step.

    Returns:
        The rollouts trained on, their statistics and advantages, metrics whose mismatch is that of engine and
        policy when they were sampled, and a row of the variance report and of the policy's distance.
    """
    staleness, waiting = run.config.rollout.staleness, run.saver.kept.waiting
    sampled = [
        (later, *sample_batch(run, later, timer))
        for later in range(step + len(waiting), step + staleness + 1)
    ]
    waiting += [_measured(run, rollouts, stats, timer) for _, rollouts, stats in sampled]
    row: MetricsRow = {}
    if report_is_due(run.config, step):  # of rollouts that the policy itself has sampled
        with timer.phase("variance"):
            _, fresh, fresh_stats = sampled[-1]
            row |= variance_report(run, step, fresh, fresh_stats, _gathered(run.parallel, fresh))
    rollouts = run.last_rollouts = waiting.pop(0)
    age = run.config.algorithm.updates_per_batch * min(staleness, step - 1)
    check_age(rollouts.weight_versions, run.policy.version, age)
    stats, advantages = gather_stats(run.parallel, rollouts), _gathered(run.parallel, rollouts)
    with timer.phase("train"):
        run.generation.memory.before_training()
        metrics = update(run, step, rollouts, stats, advantages, lr)
    row |= {"on_policy/age": age} | _distance(metrics.mismatch)
    mismatch = engine_mismatch(run.parallel, [rollouts])
    return rollouts, stats, advantages, replace(metrics, mismatch=mismatch), row


def set_proximal(run: Run, parts: Sequence[Rollouts], schedules: Sequence[MicroBatchPlan]) -> None:
    """The old log-probabilities of stale rollouts, by `algorithm.proximal`; those kept are the behavior's."""
    proximal, temperature = run.config.algorithm.proximal, run.config.rollout.temperature
    if proximal is Proximal.behavior:
        return
    for part, schedule in zip(parts, schedules, strict=True):
        current = run.policy.log_probs(part, schedule, temperature)
        if proximal is Proximal.loglinear:
            assert part.engine_log_prob is not None and part.weight_versions is not None
            age = (run.policy.version - part.weight_versions) / run.config.algorithm.updates_per_batch
            current = loglinear_proximal(part.engine_log_prob, current, age)
        part.old_log_prob = current


def _measured(run: Run, rollouts: Rollouts, stats: BatchStats, timer: PhaseTimer) -> Rollouts:
    """This rank's part of a batch with advantages and old log-probabilities, of the weights that sampled it.

    Raises:
        OnPolicyError: where engine and policy disagree.
    """
    with timer.phase("reward"):
        set_advantages(run, rollouts, stats)
    with timer.phase("train"):
        run.generation.memory.before_training()
        total, own = len(stats.groups), local_slice(run.parallel, len(stats.groups))
        schedule = run.policy.schedule(stats.sequence_lengths)
        samples = redistribute_to_dp(run.parallel, rollouts, schedule, total)
        log_probs = run.policy.log_probs(samples, schedule, run.config.rollout.temperature)
        lengths = stats.response_lengths
        of_all = of_all_tokens(run.policy, log_probs, samples, schedule, lengths)
        first = int(lengths[: own.start].sum())
        rollouts.old_log_prob = of_all[first : first + int(lengths[own].sum())]
        run.check_sampled(engine_mismatch(run.parallel, [rollouts]))
    return rollouts


def _distance(mismatch: Mismatch | None) -> MetricsRow:
    """The policy that trains against the engine that sampled: Δ = ℓ − μ over all tokens of the batch."""
    if mismatch is None:
        return {}
    return {
        "off_policy/logprob_diff_max": mismatch.max,
        "off_policy/logprob_diff_mean": mismatch.mean,
        "off_policy/k3": mismatch.k3,
        "off_policy/ess": mismatch.ess,
    }


def _gathered(parallel: Parallel, rollouts: Rollouts) -> Tensor:
    """[N] advantages of all samples; `rollouts` are this rank's part."""
    return torch.cat(all_gather_objects(parallel, rollouts.advantages))
