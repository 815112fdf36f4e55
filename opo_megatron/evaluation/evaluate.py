"""Held-out evaluation: the same problems every time, answered by sampling and greedily.

What is measured of the sampled answers is in `evaluation/metrics.py`, which `opo eval` shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opo_megatron.algorithm.on_policy import k3
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, gather_stats, redistribute_to_dp, requests_for, rewards_of
from opo_megatron.config import Config
from opo_megatron.config.choices import Kl
from opo_megatron.distributed.process_groups import all_reduce
from opo_megatron.errors import NonFiniteError, UserError
from opo_megatron.evaluation.metrics import measure_responses
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.rollout.engine import Sampling
from opo_megatron.run import STREAM_EVAL, Run
from opo_megatron.tasks import Prompt, Task
from opo_megatron.tasks.base import PromptOrder
from opo_megatron.weights.stream import WeightSource

PROBLEM_SEED = 0
"""Which problems are asked does not depend on the run's seed: runs stay comparable."""


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether OPO step `step` ends with an evaluation; the last one always does."""
    every = config.eval.every_steps
    return step == config.train.steps or (every > 0 and step % every == 0)


def evaluate(run: Run) -> MetricsRow:
    """`eval/*` metrics of the engine's current weights."""
    settings = run.config.eval
    sampling, samples = evaluation_sampling(run), settings.samples_per_problem
    problems = evaluation_problems(run.task, settings.problems)
    answers, sampled = answer(run, run.task, problems, samples, sampling, "evaluating")
    row = measure_responses(run.parallel, answers, sampled, samples, sampling).row()
    if run.config.observe.kl is Kl.eval and run.reference_weights is not None:
        row |= kl_to_start(run, answers, sampled, run.reference_weights)
    if settings.greedy:
        greedy = replace(sampling, greedy=True, temperature=1.0, top_p=1.0, top_k=0)
        _, greedy_stats = answer(run, run.task, problems, 1, greedy, "evaluating")
        row["eval/greedy_accuracy"] = float(greedy_stats.rewards.mean())
    return row


def evaluation_sampling(run: Run) -> Sampling:
    """How held-out problems are answered; the same uniform numbers at every evaluation."""
    settings = run.config.eval
    return replace(
        run.sampling(step=0),
        seed=(run.config.run.seed, STREAM_EVAL),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        energies=False,
    )


def evaluation_problems(task: Task, count: int) -> list[Prompt]:
    """The first `count` held-out problems, or all there are, of one shuffled order."""
    order = PromptOrder(task.size("held_out"), PROBLEM_SEED, STREAM_EVAL)
    return [task.prompt("held_out", index) for index in order.batch(0, min(count, order.size))]


def kl_to_start(run: Run, answers: Rollouts, summary: BatchStats, start: WeightSource) -> MetricsRow:
    """KL(π ‖ π_0) of the policy to its start weights, over the tokens that it sampled.

    Each token gives exp(δ) − 1 − δ with δ = log π_0 − log π: never negative, and unbiased because the
    token was drawn from π.  log π is what the engine recorded, log π_0 a full forward pass.
    """
    policy, parallel = run.policy, run.parallel
    schedule = policy.schedule(summary.sequence_lengths)
    batch = redistribute_to_dp(parallel, answers, schedule, len(summary.groups))
    assert batch.engine_log_prob is not None
    run.display.status("measuring the KL to the start weights")
    with policy.swap_weights(start):
        start_log_prob = policy.log_probs(batch, schedule, run.config.eval.temperature)
    divergence = k3(start_log_prob.double() - batch.engine_log_prob.double()).sum()
    total = float(all_reduce(parallel, divergence * float(parallel.is_dp_leader)))
    return {
        "eval/kl": total / float(summary.response_lengths.sum()),
        "eval/kl_per_response": total / len(summary.groups),
    }


def answer(
    run: Run, task: Task, problems: Sequence[Prompt], samples: int, sampling: Sampling, what: str
) -> tuple[Rollouts, BatchStats]:
    """`samples` rewarded answers to each problem, by the engine's current weights; a collective.

    Returns:
        This rank's block of them, and what every rank knows of all.
    """
    requests = requests_for(problems, samples, run.parallel)
    rollouts = run.draw(requests, sampling, what, interruptible=False)
    rollouts.rewards = rewards_of(task, problems, rollouts)
    try:
        return rollouts, gather_stats(run.parallel, rollouts)
    except NonFiniteError as error:  # no step that could be skipped
        raise UserError(f"in the evaluation {error}") from error
