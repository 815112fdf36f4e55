"""Held-out evaluation during training: the same problems every time, sampled and greedily.

What is measured of the responses is in `evaluation/metrics.py`, which `opo eval` shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opo_megatron.algorithm.on_policy import k3
from opo_megatron.batch.redistribute import redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, gather_stats
from opo_megatron.config import Config
from opo_megatron.config.choices import Kl
from opo_megatron.distributed.process_groups import all_reduce
from opo_megatron.errors import NonFiniteError, UserError
from opo_megatron.evaluation.metrics import measure_responses
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.rollout.engine import Sampling
from opo_megatron.rollout.generation import Generation
from opo_megatron.rollout.requests import compute_rewards, requests_for, training_sampling
from opo_megatron.run import Run
from opo_megatron.tasks import Prompt, Task
from opo_megatron.tasks.base import STREAM_EVAL, PromptOrder
from opo_megatron.weights.stream import WeightSource

PROBLEM_SEED = 0
"""Which problems are used does not depend on the run's seed: runs stay comparable."""


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether OPO step `step` ends with an evaluation; the last one always does."""
    every = config.eval.every_steps
    return step == config.train.steps or (every > 0 and step % every == 0)


def evaluate(run: Run) -> MetricsRow:
    """`eval/*` metrics of the engine's current weights; a collective of all ranks."""
    with run.watchdog.within("eval"):
        return _evaluate(run)


def _evaluate(run: Run) -> MetricsRow:
    settings, generation, task = run.config.eval, run.generation, run.task
    sampling, samples = evaluation_sampling(run.config, task), settings.samples_per_problem
    problems = evaluation_problems(task, settings.problems)
    measures_kl = run.config.observe.kl is Kl.eval and run.reference_weights is not None
    # The reference model takes the engine's experts, as in training.
    sampling = replace(sampling, routed_experts=measures_kl and bool(run.config.rollout.routing_replay))
    responses, stats = generate_eval(generation, task, problems, samples, sampling, "evaluating")
    row = measure_responses(run.parallel, responses, stats, samples, sampling).row()
    if measures_kl:
        assert run.reference_weights is not None
        row |= kl_to_reference(generation, responses, stats, run.reference_weights)
    if settings.greedy:
        greedy = replace(sampling, greedy=True, temperature=1.0, top_p=1.0, top_k=0, routed_experts=False)
        _, greedy_stats = generate_eval(generation, task, problems, 1, greedy, "evaluating")
        row["eval/greedy_accuracy"] = float(greedy_stats.rewards.mean())
    return row


def evaluation_sampling(config: Config, task: Task) -> Sampling:
    """How responses to held-out problems are sampled; the same uniform numbers at every evaluation."""
    settings = config.eval
    return replace(
        training_sampling(config, task, step=0),
        seed=(config.run.seed, STREAM_EVAL),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        energies=False,
        routed_experts=False,
    )


def evaluation_problems(task: Task, count: int) -> list[Prompt]:
    """The first `count` held-out problems, or all there are, of one shuffled order."""
    order = PromptOrder(task.size("held_out"), PROBLEM_SEED, STREAM_EVAL)
    return [task.prompt("held_out", index) for index in order.batch(0, min(count, order.size))]


def kl_to_reference(
    generation: Generation, responses: Rollouts, stats: BatchStats, reference: WeightSource
) -> MetricsRow:
    """KL(π ‖ π_0) of the policy to OPO's initial weights, over the tokens that it sampled.

    Each token gives exp(δ) − 1 − δ with δ = log π_0 − log π: never negative, and unbiased because the
    token was sampled from π.  log π is what the engine recorded, log π_0 a full forward pass.
    """
    policy, parallel = generation.policy, generation.parallel
    schedule = policy.schedule(stats.sequence_lengths)
    rollouts = redistribute_to_dp(parallel, responses, schedule, len(stats.groups))
    assert rollouts.engine_log_prob is not None
    generation.display.status("measuring the KL to the reference weights")
    with policy.swap_weights(reference):
        reference_log_prob = policy.log_probs(rollouts, schedule, generation.config.eval.temperature)
    divergence = k3(reference_log_prob.double() - rollouts.engine_log_prob.double()).sum()
    total = float(all_reduce(parallel, divergence * float(parallel.is_dp_leader)))
    return {
        "eval/kl": total / float(stats.response_lengths.sum()),
        "eval/kl_per_response": total / len(stats.groups),
    }


def generate_eval(
    generation: Generation,
    task: Task,
    problems: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    what: str,
) -> tuple[Rollouts, BatchStats]:
    """`samples` rewarded responses to each problem, by the engine's current weights; a collective.

    Returns:
        This rank's block of them, and the statistics of all.
    """
    requests = requests_for(problems, samples, generation.parallel)
    rollouts = generation.generate(requests, sampling, what, prompts=problems)
    with generation.watchdog.within("eval reward"):
        rollouts.rewards = compute_rewards(task, problems, rollouts)
    try:
        return rollouts, gather_stats(generation.parallel, rollouts)
    except NonFiniteError as error:  # no step that could be skipped
        raise UserError(f"in the evaluation {error}") from error
