"""Runs that are struck by a signal at a chosen moment, and started again by the same command.

struck_run.py PLANS [--real] ARGUMENT...

Each plan of the JSON list `PLANS` is one attempt of `opo ARGUMENT...`: null is left alone, [moment, number]
sends itself that signal when the moment comes, [moment, number, rank] only on that rank.  A rank runs the
first plan; else all are run by children, forked once everything is imported, and the list of their exit
codes (−n for a signal) is printed as the last line.  Rewards are easy ones unless they are to be real.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.checkpoint import save as checkpoint
from opo_megatron.checkpoint import writer as checkpoint_writer
from opo_megatron.cli.main import main
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.tasks.base import STREAM_EVAL, STREAM_TRAIN
from opo_megatron.tasks.lift import LiftTask


def reward(self: LiftTask, prompt: Any, response: list[int]) -> float:
    """A tiny policy never answers a lift's question: reward something that it does half of the time."""
    return float(sum(response) % 2)


def during_warm_start(strike: Callable[[], None], step: int = 14) -> None:
    """Behind an optimizer step, before its row is written."""
    train_step = Policy.train_step

    def interrupted(self: Policy, batch: Rollouts, *arguments: Any) -> Any:
        result = train_step(self, batch, *arguments)
        if batch.is_demonstration and self.version == step:
            strike()
        return result

    Policy.train_step = interrupted


def _during_drawing(strike: Callable[[], None], stream: int, calls: int) -> None:
    generate = LocalEngine.generate
    count = 0

    def interrupted(self: LocalEngine, requests: Any, sampling: Any, progress: Any = None) -> Any:
        def show(done: int, total: int, tokens: int) -> None:
            if 2 * done > total and count == calls and sampling.seed[1:2] == (stream,):
                strike()
            if progress is not None:
                progress(done, total, tokens)

        nonlocal count
        count += sampling.seed[1:2] == (stream,)
        return generate(self, requests, sampling, show)

    LocalEngine.generate = interrupted


def during_generation(strike: Callable[[], None]) -> None:
    """Half of the responses of this attempt's second OPO step are there."""
    _during_drawing(strike, STREAM_TRAIN, 2)


def during_evaluation(strike: Callable[[], None]) -> None:
    """Half of the answers of this attempt's first evaluation are there."""
    _during_drawing(strike, STREAM_EVAL, 1)


def during_training(strike: Callable[[], None]) -> None:
    """Gradients are there, the optimizer step is not."""
    accumulate = Policy.accumulate_gradients

    def interrupted(self: Policy, batch: Rollouts, *arguments: Any) -> Any:
        result = accumulate(self, batch, *arguments)
        if not batch.is_demonstration:
            strike()
        return result

    Policy.accumulate_gradients = interrupted


def during_writing(strike: Callable[[], None]) -> None:
    """The process that writes a checkpoint has written its tensors and would read them back."""
    entries_of = checkpoint_writer.entries_of

    def interrupted(*arguments: Any) -> Any:
        strike()
        return entries_of(*arguments)

    checkpoint_writer.entries_of = interrupted


def during_saving(strike: Callable[[], None]) -> None:
    """A checkpoint's tensors are written, it has no manifest and no name yet."""
    finish = checkpoint.PendingCheckpoint._finish

    def interrupted(self: checkpoint.PendingCheckpoint, *arguments: Any) -> Any:
        strike()
        return finish(self, *arguments)

    checkpoint.PendingCheckpoint._finish = interrupted


MOMENTS = {
    "warm start": during_warm_start,
    "generation": during_generation,
    "training": during_training,
    "evaluation": during_evaluation,
    "writing": during_writing,
    "saving": during_saving,
}


def attempt(plan: list[Any] | None, arguments: list[str]) -> int:
    """One run of the command; does not return where a signal ends it."""
    if arguments[0] == "--real":
        arguments = arguments[1:]
    else:
        LiftTask.reward = reward  # type: ignore[method-assign]
    if plan is not None and (len(plan) < 3 or str(plan[2]) == os.environ.get("RANK", "0")):
        moment, number = plan[:2]
        rank = os.getpid()  # also where a process beside it comes to the moment
        MOMENTS[moment](lambda: os.kill(rank, number))
    return main(arguments)


def forked(plan: list[Any] | None, arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = attempt(plan, arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    plans, command = json.loads(sys.argv[1]), sys.argv[2:]
    if "RANK" in os.environ:
        sys.exit(attempt(plans[0], command))
    print(json.dumps([forked(plan, command) for plan in plans]))
