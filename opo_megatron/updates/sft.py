"""Supervised fine-tuning on the task's demonstrations (the recipe's warm start), through OPO's policy step.

A random policy is rewarded too rarely to learn from; some steps on demonstrations give it the format
and a first accuracy.  The stage has its own learning rate and its own stream of prompts, and leaves
nothing behind but weights: the optimizer is reset before OPO's first step.
"""

from __future__ import annotations

import random

from opo_megatron.algorithm.objective import Supervised
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.rules.environment import has_environment
from opo_megatron.policy.lr_schedule import learning_rate
from opo_megatron.rollout.environments import with_answers
from opo_megatron.run import Run
from opo_megatron.tasks.base import STREAM_WARM_START

LOG_EVERY = 100
"""Steps between log lines where there is no terminal to show progress in."""


def run_sft(run: Run) -> None:
    """Run the steps that are left of the warm start, then give OPO an optimizer of its own."""
    config = run.config.warm_start
    if run.step >= 0:
        return
    while run.warm_step < config.steps:
        _supervised_step(run, run.warm_step + 1)
    if config.steps:
        run.policy.start_optimizer(run.config.optimizer)


def _supervised_step(run: Run, step: int) -> None:
    config, timer = run.config.warm_start, run.timer(step)
    demonstrations = _demonstrations(run, step)
    schedule = run.policy.schedule(demonstrations.sequence_lengths)
    objective = Supervised(max(1.0, float(demonstrations.response_lengths.sum())))
    lr = learning_rate(config, step, config.steps)
    rollouts = demonstrations.select(schedule.samples_of(run.parallel.dp_rank))
    metrics = run.policy.train_step(rollouts, schedule, objective, lr)
    row = {
        "step": step,
        "loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "lr": lr,
    }
    if metrics.entropy is not None:
        row["entropy"] = metrics.entropy
    run.display.status(f"warm start {step}/{config.steps}  loss {metrics.loss:.3f}", step / config.steps)
    if step % LOG_EVERY == 0 or step == config.steps:
        run.display.log(f"warm start  step {step}/{config.steps}  loss {metrics.loss:.3f}")
    run.finish_warm_step(row | timer.metrics())


def _demonstrations(run: Run, step: int) -> Rollouts:
    """The whole batch of a step: a function of (seed, step), so every rank makes the same one."""
    seed, count = run.config.run.seed, run.config.warm_start.batch_size
    prompts = run.choose_prompts("train", STREAM_WARM_START, seed, step - 1, count)
    responses = [
        run.task.demonstration(prompt, random.Random(f"{seed}/{step}/{index}"))
        for index, prompt in enumerate(prompts)
    ]
    rollouts = Rollouts.from_demonstrations([prompt.tokens for prompt in prompts], responses)
    if has_environment(run.config):
        return with_answers(run.config, run.task.stop_tokens, prompts, rollouts)
    return rollouts
