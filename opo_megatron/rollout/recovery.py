"""Weights out and rollouts in, through an engine that may fail on the way.

Failures don't select.  Where any rank's engine dies, hangs or breaks off, all ranks throw away what
the step has drawn, the engine is started again and given the current weights, and every response is
drawn anew: keeping those that had finished would favour short answers.  All ranks decide alike, since
the stream of weights is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import all_gather_objects
from opo_megatron.errors import EngineFailure, Preempted, UserError
from opo_megatron.rollout.engine import GenerationRequest, Progress, Sampling
from opo_megatron.rollout.probe import PROBE_SAMPLING, check_sync, largest_difference, probe_requests

if TYPE_CHECKING:
    from opo_megatron.run import Run

T = TypeVar("T")


def synchronize(run: Run) -> None:
    """Send the policy's weights to the engine and prove that they arrived.

    Raises:
        OnPolicyError: where a copy of the weights computes something else than the policy.
        UserError: where the engine fails again and again.
    """
    requests = probe_requests(run.config.policy.model, run.policy.vocab_size)

    def send() -> dict[str, Rollouts]:
        run.turns.before_update()
        try:
            run.engine.update_weights(run.policy.stream_weights(), run.policy.version)
        finally:
            run.turns.after_update()
        run.turns.before_rollout()
        return run.engine.probe(requests, PROBE_SAMPLING)

    probes = retry_collectively(run, send, run.engine.recover, "weights could not be sent")
    difference, owner = largest_difference(run.policy, run.parallel, probes)
    run.sync_difference = difference
    check_sync(difference, owner, run.config.on_policy.tolerance, run.policy.version)


def draw(run: Run, requests: Sequence[GenerationRequest], sampling: Sampling, progress: Progress) -> Rollouts:
    """One response per request of this rank; a collective."""

    def again() -> None:
        run.engine.recover()
        synchronize(run)

    return retry_collectively(
        run,
        lambda: run.engine.generate(requests, sampling, progress),
        again,
        "rollouts broke off and are all drawn again",
    )


def retry_collectively(run: Run, fn: Callable[[], T], recover: Callable[[], None], what: str) -> T:
    """`fn()` of all ranks, or `recover` and once more."""
    attempts = 1 + run.config.rollout.sglang.restarts
    for attempt in range(1, attempts + 1):
        result, failure, stop = None, None, None
        try:
            result = fn()
        except EngineFailure as error:
            failure = str(error)
        except Preempted as error:
            stop = str(error)
        gathered = all_gather_objects(run.parallel, (failure, stop))
        for _, reason in gathered:
            if reason is not None:
                raise Preempted(reason)
        failures = [one for one, _ in gathered if one is not None]
        if not failures:
            assert result is not None
            return result
        run.engine_failures += 1
        run.display.log(f"engine failure {attempt} of at most {attempts}: {failures[0]}; {what}")
        if attempt < attempts:
            recover()
    raise UserError(
        f"the engine failed {attempts} times in a row ({failures[0]}); look into its log, then go on "
        "with resume=auto"
    )
