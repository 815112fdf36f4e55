"""The loop of OPO (arXiv 2505.23585), as the paper writes it.

    for each step:                                                      in
        generate K responses per prompt with the current policy         rollout/generation.py
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
from opo_megatron.algorithm.objective import opo_objective
from opo_megatron.algorithm.on_policy import check_versions
from opo_megatron.batch.redistribute import local_slice, redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, gather_stats
from opo_megatron.build import open_run
from opo_megatron.config import Config
from opo_megatron.evaluation.evaluate import evaluate, evaluation_is_due
from opo_megatron.kernels.advantages import compute_advantages
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.step_metrics import step_row
from opo_megatron.policy.lr_schedule import learning_rate
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.rollout.requests import compute_rewards, requests_for, training_sampling
from opo_megatron.run import Run
from opo_megatron.updates.nonfinite import handle_nonfinite
from opo_megatron.updates.ppo import ppo_updates
from opo_megatron.updates.sft import run_sft
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
    config, policy, parallel, timer = run.config, run.policy, run.parallel, run.timer(step)

    with timer.phase("rollout"):
        prompts = run.prompts(step)
        requests = requests_for(prompts, config.rollout.samples_per_prompt, parallel)
        sampling = training_sampling(config, run.task, step)
        rollouts = run.generation.generate(requests, sampling, f"step {step}  generating", interruptible=True)
        run.last_rollouts = rollouts
        check_versions(rollouts.weight_versions, policy.version)

    with timer.phase("reward"):
        rollouts.rewards = compute_rewards(run.task, prompts, rollouts)
        stats = run.generation.with_energies(rollouts, gather_stats(parallel, rollouts))
        advantages = compute_advantages(
            config.algorithm, stats.rewards, stats.response_lengths, stats.groups, parallel.device,
            stats.energies, run.fitted_weights,
        )  # fmt: skip
        rollouts.advantages = advantages[local_slice(parallel, len(advantages))]

    report: MetricsRow = {}
    if report_is_due(config, step):
        with timer.phase("variance"):
            report = variance_report(run, step, rollouts, stats, advantages)

    with timer.phase("train"):
        run.generation.memory.before_training()
        lr = learning_rate(config.optimizer, step, config.train.steps)
        metrics = UPDATES[config.algorithm.objective](run, step, rollouts, stats, advantages, lr)

    with timer.phase("sync"):
        run.generation.synchronize()

    row = step_row(config, policy.vocab_size, step, stats, advantages, metrics, lr) | report
    if evaluation_is_due(config, step):
        with timer.phase("eval"):
            row |= evaluate(run)
    run.finish_step(row | timer.metrics(), rollouts=rollouts)


def opo_update(
    run: Run, step: int, rollouts: Rollouts, stats: BatchStats, advantages: Tensor, lr: float
) -> StepMetrics:
    """The one optimizer step of `step`; samples with advantage 0 run forward only."""
    config, policy = run.config, run.policy
    schedule = policy.schedule(stats.sequence_lengths, zero_advantage=advantages == 0)
    samples = redistribute_to_dp(run.parallel, rollouts, schedule, len(advantages))
    objective = opo_objective(
        config.algorithm, config.on_policy, stats.response_lengths, config.rollout.temperature
    )
    return policy.train_step(samples, schedule, objective, lr, run.check_on_policy)


UPDATES = {ObjectiveName.policy_gradient: opo_update, ObjectiveName.clipped: ppo_updates}
