"""One run: its parts, where it stands, and what happens when a step is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from opo_megatron.algorithm.energy import needs_energies
from opo_megatron.algorithm.fitted_weights import STATE, FittedWeights
from opo_megatron.algorithm.on_policy import check_mismatch
from opo_megatron.audit.record import audit_row
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.batch.stats import BatchStats, gather_to_rank0, redistribute_to_dp
from opo_megatron.checkpoint.checkpoint import PendingCheckpoint, RunProgress
from opo_megatron.checkpoint.retention import Retention
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.errors import OnPolicyError, Preempted, SaveError
from opo_megatron.observe.console import Display
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.run_files import RunFiles
from opo_megatron.observe.step_metrics import memory_metrics, throughput_metrics
from opo_megatron.observe.summary_table import closing_table
from opo_megatron.observe.timing import PhaseTimer
from opo_megatron.policy.measure import measure_energies
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.policy.policy import LocalParams, Policy
from opo_megatron.resilience.stop import StopRequest
from opo_megatron.resilience.watchdog import Watchdog
from opo_megatron.rollout.engine import GenerationRequest, Progress, RolloutEngine, Sampling
from opo_megatron.rollout.memory_sharing import MemorySharing
from opo_megatron.rollout.recovery import draw, synchronize
from opo_megatron.tasks import Prompt, Task
from opo_megatron.tasks.base import PromptOrder, Split
from opo_megatron.weights.reference_weights import ReferenceWeights

STREAM_TRAIN, STREAM_WARM_START, STREAM_EVAL = range(3)
"""Independent streams of random numbers."""


@dataclass
class Run:
    """Everything that a step needs, the same on every rank but for the rank's own part."""

    config: Config
    parallel: Parallel
    task: Task
    policy: Policy
    engine: RolloutEngine
    turns: MemorySharing
    """With memory, between policy and engine."""
    files: RunFiles
    display: Display
    stop: StopRequest
    watchdog: Watchdog
    retention: Retention
    extra_state: dict[str, Any]
    """What estimators remember beyond the weights, name → JSON value: it goes into every checkpoint and
    comes back from it."""
    reference_weights: ReferenceWeights | None = None
    """Those of step 0, where the KL to them is measured."""
    step: int = -1
    """Last finished OPO step; step 0 is the evaluation before the first update, −1 is before that."""
    warm_step: int = 0
    """Last finished warm-start step."""
    sync_difference: float = 0.0
    """Largest |Δ log-probability| of the probe after the last sync."""
    engine_failures: int = 0
    """Of this attempt."""
    reference_params: LocalParams | None = None
    """This rank's part of the start weights, where the objective has a KL to them."""
    fitted_weights: FittedWeights = field(default_factory=FittedWeights)
    """What `baseline=auto` has learned."""
    drawn: Rollouts | None = None
    """This rank's part of the last training batch."""
    pending: PendingCheckpoint | None = None
    """The checkpoint that is being written."""
    saved: RunProgress | None = None
    """The last checkpoint, of this attempt or the one that it went on from."""
    started: float = field(default_factory=time.monotonic)
    _orders: dict[tuple[int, int], PromptOrder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if STATE in self.extra_state:
            self.fitted_weights.restore(self.extra_state[STATE])

    def choose_prompts(self, split: Split, stream: int, seed: int, batch: int, count: int) -> list[Prompt]:
        """Batch 0, 1, 2, … of `count` prompts from a shuffled split; a function of its arguments alone."""
        order = self._orders.setdefault((stream, seed), PromptOrder(self.task.size(split), seed, stream))
        return [self.task.prompt(split, index) for index in order.batch(batch, count)]

    def prompts(self, step: int) -> list[Prompt]:
        """The prompts of an OPO step (the first is 1)."""
        count = self.config.rollout.prompts_per_step
        return self.choose_prompts("train", STREAM_TRAIN, self.config.run.seed, step - 1, count)

    def sampling(self, step: int) -> Sampling:
        """How the responses of an OPO step are drawn."""
        settings = self.config.rollout
        return Sampling(
            max_tokens=settings.max_response_tokens,
            stop_tokens=self.task.stop_tokens,
            seed=(self.config.run.seed, STREAM_TRAIN, step),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            energies=needs_energies(self.config.algorithm),
        )

    def timer(self, step: int) -> PhaseTimer:
        """Of a step of either kind, whose phases the watchdog watches from here on."""
        self.watchdog.enter("warm start" if self.step < 0 else "step", step)
        return PhaseTimer(self.watchdog.enter)

    def progress(self, what: str) -> Progress:
        """Shows an engine's progress under the name `what`."""
        begun = time.monotonic()
        seen = (0, 0)

        def show(done: int, total: int, tokens: int) -> None:
            nonlocal seen
            if (done, tokens) != seen:  # an engine that only says that it still waits makes no progress
                seen = (done, tokens)
                self.watchdog.progress()
            rate = tokens / max(1e-9, time.monotonic() - begun)
            text = f"{what}  {done}/{total} responses  {rate:,.0f} tokens/s"
            self.display.status(text, done / max(1, total))

        return show

    def synchronize(self) -> None:
        """Send the policy's weights to the engine and prove that they arrived."""
        synchronize(self)

    def draw(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, what: str, interruptible: bool = True
    ) -> Rollouts:
        """One response per request of this rank, from the engine's current weights; a collective.

        Args:
            may_be_cut: a training batch, which the next attempt draws again.

        Raises:
            Preempted: on all ranks where the run has to end; it is saved then.
        """
        show = self.progress(what)

        def show_or_stop(done: int, total: int, tokens: int) -> None:
            show(done, total, tokens)
            self.stop.raise_if_stopping()

        if not interruptible:
            return draw(self, requests, sampling, show)
        try:
            self.drawn = draw(self, requests, sampling, show_or_stop)
            return self.drawn
        except Preempted:
            self._save_before_leaving(RunProgress("step", self.step))
            raise

    def with_energies(self, rollouts: Rollouts, stats: BatchStats) -> BatchStats:
        """The step's summary with the energies that the baseline needs: by a forward-only pass where the
        engine returned none; a collective.

        Args:
            rollouts: this rank's part.
        """
        if stats.energies is not None or not needs_energies(self.config.algorithm):
            return stats
        self.turns.before_training()
        total, temperature = len(stats.groups), self.config.rollout.temperature
        schedule = self.policy.schedule(stats.sequence_lengths)
        samples = redistribute_to_dp(self.parallel, rollouts, schedule, total)
        return replace(stats, energies=measure_energies(self.policy, samples, schedule, total, temperature))

    def save_reference_weights(self) -> None:
        """Write the weights that OPO begins with, where the KL to them is measured."""
        if self.reference_weights is not None:
            self.display.status("keeping the start weights")
            self.reference_weights.write(self.policy.stream_weights())

    # ------------------------------------------------------------------ finishing a step

    def finish_warm_step(self, row: MetricsRow) -> None:
        """Write a warm-start step, then save where it is time to."""
        self.files.write_warm_start(row)
        self.warm_step = row["step"]
        self._save_or_leave(RunProgress("warm_start", self.warm_step), self.config.warm_start.steps, {})

    def finish_step(self, row: MetricsRow, rollouts: Rollouts | None = None) -> None:
        """Write an OPO step, then save where it is time to."""
        if rollouts is not None and self.config.observe.save_rollouts:
            self.files.write_rollouts(row["step"], gather_to_rank0(self.parallel, rollouts))
        if self.config.observe.audit:
            started = time.perf_counter()
            audit = audit_row(self.policy, self.config, self.extra_state, row["step"], rollouts)
            self.files.write_audit(audit)
            row["time/audit"] = time.perf_counter() - started
        row |= {"on_policy/sync_diff_max": self.sync_difference, "run/engine_failures": self.engine_failures}
        row["run/verifier_failures"] = int(all_reduce(self.parallel, torch.tensor(self.task.failures)))
        self.files.write_step(row | throughput_metrics(row) | memory_metrics())
        self.display.row(row)
        self.step = row["step"]
        self._save_or_leave(RunProgress("step", self.step), self.config.train.steps, row)

    def _save_or_leave(self, progress: RunProgress, last: int, row: MetricsRow) -> None:
        """Save where it is due; where any rank was told to stop, save and leave.

        Raises:
            Preempted: on all ranks, once everything is saved.
        """
        is_writing = self.pending is not None and not self.pending.is_written()
        flags = (self.retention.minutes_are_over(), is_writing)
        reason, (minutes_are_over, any_is_writing) = self.stop.agree(*flags)
        if not any_is_writing:
            self._complete_pending()
        # Step 0 has the weights of the warm start's last step, or those of the beginning.
        has_weights = progress.step > 0
        is_best = has_weights and self.retention.note_best(row, progress)
        is_done = progress.phase == "step" and progress.step >= last
        if has_weights and self.retention.is_due(progress.step, last, minutes_are_over, is_best):
            self._save(progress, must_succeed=progress.step == last)
        if reason is not None and not is_done:
            self._save_before_leaving(progress)
            raise Preempted(reason)

    def _save_before_leaving(self, progress: RunProgress) -> None:
        self._complete_pending()
        if progress.step > 0 and progress != self.saved:
            self._save(progress, must_succeed=True)

    def _save(self, progress: RunProgress, must_succeed: bool) -> None:
        """Begin a checkpoint when the one before it is complete; what must succeed is waited for."""
        self._complete_pending()
        self.watchdog.enter("checkpoint")
        self.display.status(f"saving {progress.folder}")
        beside = self.config.checkpoint.asynchronous and not must_succeed
        with self._failure_survived(progress, must_succeed):
            with self.turns.saving():
                self.pending = PendingCheckpoint(self.policy, self.config, progress, self.extra_state, beside)
            if not beside:
                self._complete_pending(must_succeed)

    def _complete_pending(self, must_succeed: bool = False) -> None:
        """Give the checkpoint that is being written its name, once it is whole."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        with self._failure_survived(pending.progress, must_succeed):
            pending.complete()
            self.saved = pending.progress
            self.retention.saved(Path(self.config.run.dir), self.files.writes)

    def cancel_pending(self) -> None:
        """Give up the checkpoint that is being written, where the run has failed."""
        if self.pending is not None:
            self.pending.cancel()

    @contextmanager
    def _failure_survived(self, progress: RunProgress, must_succeed: bool) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if must_succeed or self.config.checkpoint.on_failure == "stop":
                raise
            self.retention.failed(progress)
            self.display.log(f"warning: {error}; the run goes on without it")

    def summarize(self) -> None:
        """Write summary.json and show the closing table."""
        seconds = time.monotonic() - self.started
        rows = self.files.metrics.read() if self.files.writes else []
        if not rows:
            return
        first, last = rows[0], rows[-1]
        if last["run/attempt"] != self.files.attempt:
            steps = self.config.train.steps
            self.display.log(f"nothing was left to do: {self.config.run.dir} has its {steps} OPO steps")
            return
        names = [name for name in last if not name.startswith(("time/", "memory/", "throughput/", "run/"))]
        self.files.write_summary(
            {
                "steps": last["step"],
                "start": {name: first[name] for name in names if name in first},
                "end": {name: last[name] for name in names},
                "time/seconds_of_this_attempt": seconds,
                "run/attempt": last["run/attempt"],
            }
        )
        self.display.close()
        self.display.summary(*closing_table(self.config, rows, seconds))


def check_on_policy(run: Run, metrics: StepMetrics) -> None:
    """Refuse a step whose samples the policy did not draw, before its optimizer step."""
    if metrics.mismatch is None:
        raise OnPolicyError("the engine recorded no log-probabilities, so on-policyness cannot be measured")
    warning = check_mismatch(run.config.on_policy, metrics.mismatch)
    if warning is not None:
        run.display.log(f"warning: {warning}")
