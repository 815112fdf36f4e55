"""Fault-injected runs: a signal at a chosen point, then a resume by the same command.

interrupted_run.py FAULTS [--real] ARGUMENT...

Each entry of the JSON list `FAULTS` is one attempt of `opo ARGUMENT...`: null is not interrupted,
[point, signal] sends itself that signal at that point, [point, signal, rank] only on that rank, and
["server", points] kills the run's SGLang server at each of these points.  The point "streamed N" is event N
of this attempt's second step that overlaps: responses that end, parts that begin and end, the update.  A rank
runs the first entry; otherwise each runs in a child, forked after all imports, and the list of exit codes
(−n for a signal) is printed as the last line.  `--real` keeps the task's reward.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.checkpoint import save as checkpoint
from opo_megatron.checkpoint import writer as checkpoint_writer
from opo_megatron.cli.main import main
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.tasks.base import STREAM_EVAL, STREAM_TRAIN
from opo_megatron.tasks.lift import LiftTask
from tests.support.tiny_run import easy_reward


def during_warm_start(inject: Callable[[], None], step: int = 14) -> None:
    """After an optimizer step, before its metrics row is written."""
    train_step = Policy.train_step

    def interrupted(self: Policy, batch: Rollouts, *arguments: Any) -> Any:
        result = train_step(self, batch, *arguments)
        if batch.is_demonstration and self.version == step:
            inject()
        return result

    Policy.train_step = interrupted


def _during_rollouts(inject: Callable[[], None], stream: int, calls: int) -> None:
    for engine in (LocalEngine, SglangEngine):
        _during_rollouts_of(engine, inject, stream, calls)


def _during_rollouts_of(engine: Any, inject: Callable[[], None], stream: int, calls: int) -> None:
    generate = engine.generate
    count = 0

    def interrupted(self: Any, requests: Any, sampling: Any, progress: Any = None, *deliver: Any) -> Any:
        def show(done: int, total: int, tokens: int) -> None:
            if 2 * done > total and count == calls and sampling.seed[1:2] == (stream,):
                inject()
            if progress is not None:
                progress(done, total, tokens)

        nonlocal count
        count += sampling.seed[1:2] == (stream,)
        return generate(self, requests, sampling, show, *deliver)

    engine.generate = interrupted


def during_generation(inject: Callable[[], None]) -> None:
    """Half of the responses of this attempt's second OPO step are generated."""
    _during_rollouts(inject, STREAM_TRAIN, 2)


def during_evaluation(inject: Callable[[], None]) -> None:
    """Half of the responses of this attempt's first evaluation are generated."""
    _during_rollouts(inject, STREAM_EVAL, 1)


def during_training(inject: Callable[[], None]) -> None:
    """Gradients of a step are accumulated, the optimizer step is not done."""
    accumulate, train_step = Policy.accumulate_gradients, Policy.train_step
    in_step: list[bool] = []  # the check of exact mode accumulates gradients, too

    def step(self: Policy, *arguments: Any) -> Any:
        in_step.append(True)
        try:
            return train_step(self, *arguments)
        finally:
            in_step.clear()

    def interrupted(self: Policy, batch: Rollouts, *arguments: Any) -> Any:
        result = accumulate(self, batch, *arguments)
        if in_step and not batch.is_demonstration:
            inject()
        return result

    Policy.accumulate_gradients, Policy.train_step = interrupted, step


def during_streamed_step(inject: Callable[[], None], number: int) -> None:
    """At an event of this attempt's second streamed step."""
    generate, add, finish = SglangEngine.generate, Policy.add_gradients, Policy.finish_streamed_step
    steps, events = itertools.count(1), itertools.count(1)
    in_step: list[bool] = []

    def event() -> None:
        if in_step and next(events) == number:
            inject()

    def streamed(self: Any, requests: Any, sampling: Any, progress: Any = None, deliver: Any = None) -> Any:
        if deliver is None:
            return generate(self, requests, sampling, progress)
        if next(steps) == 2:
            in_step.append(True)

        def noting(part: Rollouts) -> None:
            for _ in range(len(part)):
                event()
            deliver(part)

        return generate(self, requests, sampling, progress, noting)

    def adding(self: Policy, *arguments: Any) -> None:
        event()
        add(self, *arguments)
        event()

    def finishing(self: Policy, *arguments: Any) -> Any:
        event()
        return finish(self, *arguments)

    SglangEngine.generate, Policy.add_gradients = streamed, adding  # type: ignore[method-assign]
    Policy.finish_streamed_step = finishing  # type: ignore[method-assign]


def during_writing(inject: Callable[[], None]) -> None:
    """The checkpoint writer has written its tensors and has not read them back."""
    entries_of = checkpoint_writer.entries_of

    def interrupted(*arguments: Any) -> Any:
        inject()
        return entries_of(*arguments)

    checkpoint_writer.entries_of = interrupted


def during_saving(inject: Callable[[], None]) -> None:
    """A checkpoint's tensors are written, but no manifest; the folder is not renamed yet."""
    finish = checkpoint.PendingCheckpoint._finish

    def interrupted(self: checkpoint.PendingCheckpoint, *arguments: Any) -> Any:
        inject()
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


def moment(point: str) -> Callable[[Callable[[], None]], None]:
    """What injects a fault at a point, by its name."""
    if point.startswith("streamed "):
        return partial(during_streamed_step, number=int(point.removeprefix("streamed ")))
    return MOMENTS[point]


def attempt(fault: list[Any] | None, arguments: list[str]) -> int:
    """One run of the command; does not return where a signal kills the process."""
    if arguments[0] == "--real":
        arguments = arguments[1:]
    else:
        LiftTask.reward = easy_reward  # type: ignore[method-assign]
    if fault is not None and fault[0] == "server":
        for point in fault[1]:
            moment(point)(_killing_the_server(arguments))
    elif fault is not None and (len(fault) < 3 or str(fault[2]) == os.environ.get("RANK", "0")):
        point, signal_number = fault[:2]
        rank, sent = os.getpid(), []  # also where a child process reaches the point

        def inject() -> None:
            """Once: a second SIGTERM would end the run at once."""
            if not sent:
                sent.append(signal_number)
                os.kill(rank, signal_number)

        moment(point)(inject)
    return main(arguments)


def _killing_the_server(arguments: list[str]) -> Callable[[], None]:
    """Kills the server's main process, once."""
    run_dir = next(one for one in arguments if one.startswith("run.dir=")).removeprefix("run.dir=")
    killed: list[int] = []

    def inject() -> None:
        if not killed:
            killed.append(int((Path(run_dir) / "sglang" / "server_0.pid").read_text()))
            os.kill(killed[0], signal.SIGKILL)

    return inject


def forked(fault: list[Any] | None, arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = attempt(fault, arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    faults, command = json.loads(sys.argv[1]), sys.argv[2:]
    if "RANK" in os.environ:
        sys.exit(attempt(faults[0], command))
    print(json.dumps([forked(fault, command) for fault in faults]))
