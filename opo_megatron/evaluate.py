"""Held-out evaluation: the same problems every time, answered by sampling and greedily."""

from __future__ import annotations

from dataclasses import replace

from opo_megatron.config import Config
from opo_megatron.observe.rows import Row
from opo_megatron.rollout.batch import Summary, gather_summary, requests_for, rewards_of
from opo_megatron.rollout.engine import Sampling
from opo_megatron.run import STREAM_EVAL, Run

PROBLEM_SEED = 0
"""Which problems are asked does not depend on the run's seed: runs stay comparable."""


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether OPO step `step` ends with an evaluation; the last one always does."""
    every = config.eval.every_steps
    return step == config.train.steps or (every > 0 and step % every == 0)


def evaluate(run: Run) -> Row:
    """`eval/*` metrics of the engine's current weights."""
    settings = run.config.eval
    sampling = replace(
        run.sampling(step=0),
        seed=(run.config.run.seed, STREAM_EVAL),
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
    )
    sampled = _answer(run, settings.samples_per_problem, sampling)
    row: Row = {
        "eval/problems": int(sampled.groups.max()) + 1,
        "eval/accuracy": float(sampled.rewards.mean()),
        "eval/response_length/mean": float(sampled.response_lengths.double().mean()),
        "eval/response_length/truncated": sampled.truncated,
    }
    if settings.greedy:
        greedy = _answer(run, 1, replace(sampling, greedy=True, temperature=1.0, top_p=1.0, top_k=0))
        row["eval/greedy_accuracy"] = float(greedy.rewards.mean())
    return row


def _answer(run: Run, samples: int, sampling: Sampling) -> Summary:
    count = min(run.config.eval.problems, run.task.size("held_out"))
    prompts = run.choose_prompts("held_out", STREAM_EVAL, PROBLEM_SEED, 0, count)
    requests = requests_for(prompts, samples, run.parallel)
    rollouts = run.engine.generate(requests, sampling, run.progress("evaluating"))
    rollouts.rewards = rewards_of(run.task, prompts, rollouts)
    return gather_summary(run.parallel, rollouts)
