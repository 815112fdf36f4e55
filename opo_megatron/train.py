"""The loop of OPO (arXiv 2505.23585), as the paper writes it.

    for each step:                                                      in
        generate K responses per prompt with the current policy         updates/sample_batch.py
        reward them                                                     tasks/
        A = r − b,  b = Σ l·r / Σ l over each prompt's responses        algorithm/advantages.py
        one optimizer step on −(1/N) Σ A Σ log π, never a second one    policy/policy.py
        send the new weights to the engine                              weights/param_mapping.py
        evaluate and save, where it is due                              evaluation/, checkpoint/saver.py

Every rank runs this same program.  What is left out is the point: no clip, no KL term, no entropy
bonus, no critic, no reference model, no second update on old samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opo_megatron.algorithm.config import ObjectiveName
from opo_megatron.batch.expert_load import expert_load
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.build import open_run
from opo_megatron.config import Config
from opo_megatron.config.choices import ReplayMethod
from opo_megatron.evaluation.evaluate import evaluate, evaluation_is_due
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.step_metrics import step_row
from opo_megatron.policy.lr_schedule import learning_rate
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.run import Run
from opo_megatron.updates.advantages import set_advantages
from opo_megatron.updates.experience_replay import replay_update
from opo_megatron.updates.nonfinite import handle_nonfinite
from opo_megatron.updates.off_policy import off_policy_updates
from opo_megatron.updates.opo import opo_part
from opo_megatron.updates.overlap import overlapped_update
from opo_megatron.updates.sample_batch import sample_batch
from opo_megatron.updates.sft import run_sft
from opo_megatron.updates.staleness import stale_update
from opo_megatron.updates.variance_report import report_is_due, variance_report


def train(config: Config, allowed: Sequence[str] = ()) -> None:
    """Train by OPO as the recipe says, resuming where it asks for that.

    Args:
        allowed: keys that a resumed run may change.
    """
    with open_run(config, allowed) as run:
        run_sft(run)
        run.generation.synchronize()
        if run.step < 0:
            run.save_reference_weights()
            run.finish_step({"step": 0} | evaluate(run))
        while run.step < config.train.steps:
            with handle_nonfinite(run, run.step + 1):
                opo_step(run, run.step + 1)
        run.summarize()


def opo_step(run: Run, step: int) -> None:
    """One batch of rollouts, one optimizer step."""
    config, policy, timer = run.config, run.policy, run.timer(step)

    lr = learning_rate(config.optimizer, step, config.train.steps)
    report: MetricsRow = {}

    if config.rollout.overlap:  # the same, trained on group by group while others are sampled
        rollouts, stats, advantages, metrics, report = overlapped_update(run, step, lr, timer.timeline)
    elif config.rollout.staleness:  # off-policy on purpose, for comparison
        update = UPDATES[config.algorithm.objective]
        rollouts, stats, advantages, metrics, report = stale_update(run, step, lr, timer, update)
    else:
        rollouts, stats = sample_batch(run, step, timer)
        with timer.phase("reward"):
            advantages = set_advantages(run, rollouts, stats)

        if report_is_due(config, step):
            with timer.phase("variance"):
                report = variance_report(run, step, rollouts, stats, advantages)

        with timer.phase("train"):
            run.generation.memory.before_training()
            if config.rollout.replay.method is ReplayMethod.off:
                metrics = UPDATES[config.algorithm.objective](run, step, rollouts, stats, advantages, lr)
            else:  # off-policy on purpose, for comparison
                metrics, replayed = replay_update(run, step, rollouts, stats, advantages, lr)
                report |= replayed

    with timer.phase("sync"):
        run.generation.synchronize()

    row = step_row(config, policy.vocab_size, step, stats, advantages, metrics, lr) | report
    row |= expert_load(run.parallel, rollouts.routed_experts, config.policy.model)
    if evaluation_is_due(config, step):
        with timer.phase("eval"):
            row |= evaluate(run)
    run.finish_step(row | timer.metrics(), rollouts, timer.timeline)


def opo_update(
    run: Run, step: int, rollouts: Rollouts, stats: BatchStats, advantages: Tensor, lr: float
) -> StepMetrics:
    """The one optimizer step of `step`; samples of zero-variance groups run forward only."""
    return run.policy.train_step(*opo_part(run, rollouts, stats, advantages), lr, run.check_on_policy)


UPDATES = dict.fromkeys(ObjectiveName, off_policy_updates) | {ObjectiveName.policy_gradient: opo_update}
