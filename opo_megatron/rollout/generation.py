"""What generates: the engine, its weights, the memory it shares with the policy, recovery from failures.

Failures must not select responses.  Where any rank's engine dies, hangs or closes a connection, all ranks
restart their engines and send them the current weights.  Then every response is continued from all of its
tokens that were received, whether it had ended or not; an engine that does not receive tokens as they are
sampled generates all responses again: keeping only the finished ones would favour short responses.  All
ranks decide together, because the weight stream is a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from opo_megatron.algorithm.config import corrects_token_energies, needs_energies, needs_token_energies
from opo_megatron.batch.redistribute import redistribute_to_dp
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import EngineFailure, Preempted, UserError
from opo_megatron.observe.console import Display
from opo_megatron.policy.policy import Policy
from opo_megatron.policy.token_measures import measure_energies, measure_token_energies
from opo_megatron.resilience.stop import StopRequest
from opo_megatron.resilience.watchdog import Watchdog
from opo_megatron.rollout.conversations import Environments
from opo_megatron.rollout.engine import GenerationRequest, Progress, RolloutEngine, Sampling
from opo_megatron.rollout.memory_sharing import MemorySharing
from opo_megatron.rollout.probe import check_sync, largest_difference, probe_requests, probe_sampling
from opo_megatron.tasks.base import Prompt

T = TypeVar("T")


@dataclass(kw_only=True)
class Generation:
    """Weights out to the engine, rollouts back; every method is a collective of all ranks."""

    config: Config
    parallel: Parallel
    policy: Policy
    engine: RolloutEngine
    memory: MemorySharing
    display: Display
    watchdog: Watchdog
    stop: StopRequest | None = None
    """Interrupts generation for training where the run has to end."""
    environments: Environments | None = None
    """What answers the policy between its turns; None for a task of single turns."""
    sync_difference: float = field(default=0.0, init=False)
    """Largest |Δ log-probability| of the probe after the last sync."""
    failures: int = field(default=0, init=False)
    """Engine failures of this attempt."""
    tokens_continued: int = field(default=0, init=False)
    """Tokens of this step, of all ranks, that were received before an engine failure and were not lost."""

    def synchronize(self) -> None:
        """Send the policy's weights to the engine and prove that they arrived.

        Raises:
            OnPolicyError: where a copy of the weights computes something else than the policy.
            UserError: where the engine fails again and again.
        """
        requests = probe_requests(self.config.policy.model, self.policy.vocab_size)

        def send() -> dict[str, Rollouts]:
            self.memory.before_update()
            try:
                self.engine.update_weights(self.policy.stream_weights(), self.policy.version)
            finally:
                self.memory.after_update()
            self.memory.before_rollout()
            return self.engine.probe(requests, probe_sampling(self.config))

        with self.watchdog.within("sync"):
            probes = self._retry_collectively(send, self._recover, "weights could not be sent")
            difference, owner = largest_difference(self.policy, self.parallel, probes)
        self.sync_difference = difference
        check_sync(difference, owner, self.config.on_policy.tolerance, self.policy.version)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        what: str,
        interruptible: bool = False,
        prompts: Sequence[Prompt] = (),
    ) -> Rollouts:
        """One response per request of this rank, from the engine's current weights.

        Where the run has environments, every response is a conversation and comes with its reward.

        Args:
            prompts: of all requests, by their group; only environments need them.
            what: names the work in the progress line.
            interruptible: whether a stop request ends it early; the next attempt generates the same again.

        Raises:
            Preempted: on all ranks, where it was interrupted.
        """
        show = self.progress(what)

        def show_or_stop(done: int, total: int, tokens: int) -> None:
            show(done, total, tokens)
            if interruptible and self.stop is not None:
                self.stop.raise_if_stopping()

        def attempt(_: bool) -> Rollouts:
            if self.environments is None:
                return self.engine.generate(requests, sampling, show_or_stop)
            conversations = self.environments.open(requests, [prompts[r.group] for r in requests], sampling)
            try:
                return self.engine.generate(requests, sampling, show_or_stop, conversations=conversations)
            finally:
                conversations.close()

        return self.retry(attempt, sampling)

    def retry(self, attempt: Callable[[bool], T], sampling: Sampling) -> T:
        """`attempt` of all ranks, which generates; where an engine of one fails, all do it once more.

        Args:
            attempt: is told whether the engines of all ranks continue what the attempt before has left.
            sampling: that of all its responses.

        Raises:
            Preempted: on all ranks, where it was interrupted.
        """
        continues = False

        def recover() -> None:
            nonlocal continues
            self._recover()
            self.synchronize()
            kept = all_gather_objects(self.parallel, self.engine.kept_tokens(sampling))
            continues = None not in kept
            tokens = sum(one or 0 for one in kept)
            self.tokens_continued += tokens
            self.display.log(
                f"{tokens:,} tokens that were received stay, and the responses of the step are continued"
                if continues
                else "all responses of the step are generated again"
            )

        return self._retry_collectively(lambda: attempt(continues), recover, "the engine is restarted")

    def with_energies(self, rollouts: Rollouts, stats: BatchStats) -> BatchStats:
        """The step's statistics with the energies that the baseline needs, by a forward-only pass where the
        engine returned none.

        Args:
            rollouts: this rank's part.
        """
        algorithm, on_policy = self.config.algorithm, self.config.on_policy
        needs_sums = stats.energies is None and needs_energies(algorithm)
        needs_tokens = stats.token_energies is None and needs_token_energies(algorithm)
        if not (needs_sums or needs_tokens):
            return stats
        self.memory.before_training()
        total, temperature = len(stats.groups), self.config.rollout.temperature
        schedule = self.policy.schedule(stats.sequence_lengths)
        samples = redistribute_to_dp(self.parallel, rollouts, schedule, total)
        if needs_sums:
            sums = measure_energies(self.policy, samples, schedule, total, temperature)
            return replace(stats, energies=sums)
        cap = on_policy.max_importance_weight if corrects_token_energies(algorithm, on_policy) else None
        energies = measure_token_energies(self.policy, samples, schedule, stats, temperature, cap)
        return replace(stats, token_energies=energies)

    def _recover(self) -> None:
        """Make the engine usable again; it holds no weights then."""
        self.memory.before_restart()
        self.engine.recover()

    def progress(self, what: str) -> Progress:
        """Shows an engine's progress as `what`, and tells the watchdog of it."""
        started = time.monotonic()
        last = (0, 0)

        def show(done: int, total: int, tokens: int) -> None:
            nonlocal last
            if (done, tokens) != last:  # unchanged numbers are not progress
                last = (done, tokens)
                self.watchdog.progress()
            rate = tokens / max(1e-9, time.monotonic() - started)
            if (activity := self.engine.activity()) is not None:
                self.watchdog.progress()  # compiling has a time limit of its own
                self.display.status(activity)
                return
            text = f"{what}  {done}/{total} responses  {rate:,.0f} tokens/s"
            self.display.status(text, done / max(1, total))

        return show

    def _retry_collectively(self, fn: Callable[[], T], recover: Callable[[], None], what: str) -> T:
        """`fn()` of all ranks; where one fails, `recover()` and once more."""
        attempts = 1 + self.config.rollout.sglang.restarts
        for attempt in range(1, attempts + 1):
            result, failure, stop = None, None, None
            try:
                result = fn()
            except EngineFailure as error:
                failure = str(error)
            except Preempted as error:
                stop = str(error)
            gathered = all_gather_objects(self.parallel, (failure, stop))
            for _, reason in gathered:
                if reason is not None:
                    raise Preempted(reason)
            failures = [one for one, _ in gathered if one is not None]
            if not failures:
                assert result is not None
                return result
            self.failures += 1
            self.display.log(f"engine failure {attempt} of at most {attempts}: {failures[0]}; {what}")
            if attempt < attempts:
                recover()
        raise UserError(
            f"the engine failed {attempts} times in a row ({failures[0]}); read its log, then resume with "
            "resume=auto"
        )
