"""One run: its parts, its counters, and what finishing a step does.

What generates is `rollout/generation.py`, what saves is `checkpoint/saver.py`; both know nothing of a run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from opo_megatron.algorithm.fitted_weights import STATE, FittedWeights
from opo_megatron.algorithm.on_policy import Mismatch, check_mismatch
from opo_megatron.audit.record import audit_row
from opo_megatron.batch.redistribute import gather_to_rank0
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.checkpoint.progress import RunProgress
from opo_megatron.checkpoint.saver import CheckpointSaver
from opo_megatron.config import Config
from opo_megatron.config.rules.resilience import VOLATILE
from opo_megatron.distributed import outcome
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects, all_reduce
from opo_megatron.errors import OnPolicyError
from opo_megatron.observe.console import Display
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.run_files import RunFiles
from opo_megatron.observe.step_metrics import memory_metrics, throughput_metrics
from opo_megatron.observe.step_timeline import RankTimeline, timeline_row
from opo_megatron.observe.summary_table import summary_table
from opo_megatron.observe.timing import PhaseTimer
from opo_megatron.observe.utilization import peak_tflops
from opo_megatron.policy.metric_sums import StepMetrics
from opo_megatron.policy.policy import LocalParams, Policy
from opo_megatron.resilience.watchdog import Watchdog
from opo_megatron.rollout.generation import Generation
from opo_megatron.tasks import Prompt, Task
from opo_megatron.tasks.base import STREAM_TRAIN, PromptOrder, Split
from opo_megatron.tasks.user_estimator import UserEstimator
from opo_megatron.weights.reference_weights import ReferenceWeights


@dataclass(kw_only=True)
class Run:
    """The same on every rank but for the rank's own part of policy, engine and files."""

    config: Config
    parallel: Parallel
    task: Task
    policy: Policy
    generation: Generation
    saver: CheckpointSaver
    files: RunFiles
    display: Display
    watchdog: Watchdog
    reference_weights: ReferenceWeights | None = None
    """The weights of step 0, where a KL to them is measured."""
    step: int = -1
    """Last finished OPO step; step 0 is the evaluation before the first update, −1 is before that."""
    warm_step: int = 0
    """Last finished warm-start step."""
    reference_params: LocalParams | None = None
    """This rank's part of the reference weights, where the objective has a KL to them."""
    fitted_weights: FittedWeights = field(default_factory=FittedWeights)
    """What `baseline=auto` has learned."""
    estimator: UserEstimator | None = None
    """The user's own, in place of a preset's formula."""
    last_rollouts: Rollouts | None = None
    """This rank's part of the last training batch."""
    started: float = field(default_factory=time.monotonic)
    _orders: dict[tuple[int, int], PromptOrder] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outcome.set_step(self.step, self.config.train.steps)
        if STATE in self.saver.state:
            self.fitted_weights.restore(self.saver.state[STATE])

    def choose_prompts(self, split: Split, stream: int, seed: int, batch: int, count: int) -> list[Prompt]:
        """Batch 0, 1, 2, … of `count` prompts from a shuffled split; a function of its arguments alone."""
        order = self._orders.setdefault((stream, seed), PromptOrder(self.task.size(split), seed, stream))
        return [self.task.prompt(split, index) for index in order.batch(batch, count)]

    def prompts(self, step: int) -> list[Prompt]:
        """The prompts of an OPO step (the first is 1), of all its rounds."""
        rollout = self.config.rollout
        count = rollout.prompts_per_step * rollout.fill_rounds
        return self.choose_prompts("train", STREAM_TRAIN, self.config.run.seed, step - 1, count)

    def timer(self, step: int) -> PhaseTimer:
        """Of a step of either kind, whose phases the watchdog watches from here on."""
        self.watchdog.enter("warm start" if self.step < 0 else "step", step)
        return PhaseTimer(self.watchdog.enter)

    @property
    def progress(self) -> RunProgress:
        """How far the run is, as checkpoints record it."""
        return RunProgress("warm_start", self.warm_step) if self.step < 0 else RunProgress("step", self.step)

    def save_reference_weights(self) -> None:
        """Write the weights that OPO begins with, where the KL to them is measured."""
        if self.reference_weights is not None:
            self.display.status("writing the reference weights")
            self.reference_weights.write(self.policy.stream_weights())

    # ------------------------------------------------------------------ finishing a step

    def finish_warm_step(self, row: MetricsRow) -> None:
        """Log a warm-start step, then save where it is due."""
        self.files.write_warm_start(row)
        self.warm_step = row["step"]
        self.saver.save_or_stop(self.progress, self.config.warm_start.steps, {})

    def finish_step(
        self, row: MetricsRow, rollouts: Rollouts | None = None, timeline: RankTimeline | None = None
    ) -> None:
        """Log an OPO step, then save where it is due."""
        if timeline is not None and self.config.rollout.overlap:
            ranks = all_gather_objects(self.parallel, timeline)
            self.files.write_timeline(timeline_row(row["step"], ranks))
        if rollouts is not None and self.config.observe.save_rollouts:
            self.files.write_rollouts(row["step"], gather_to_rank0(self.parallel, rollouts))
        if self.config.observe.audit:
            started = time.perf_counter()
            audit = audit_row(self.policy, self.config, self.saver.state, row["step"], rollouts)
            self.files.write_audit(audit)
            row["time/audit"] = time.perf_counter() - started
        row["on_policy/sync_diff_max"] = self.generation.sync_difference
        row["run/engine_failures"] = self.generation.failures
        row["run/tokens_continued"] = self.generation.tokens_continued
        self.generation.tokens_continued = 0
        row["run/verifier_failures"] = int(all_reduce(self.parallel, torch.tensor(self.task.failures)))
        if (environments := self.generation.environments) is not None:
            failures = all_reduce(self.parallel, torch.tensor(environments.failures))
            row["run/environment_failures"] = int(failures)
        throughput = throughput_metrics(row, peak_tflops(self.parallel))
        memory = memory_metrics() | self.generation.memory.metrics
        self.files.write_step(row | throughput | memory)
        self.display.row(row)
        self.step = row["step"]
        outcome.set_step(self.step, self.config.train.steps)
        self.saver.save_or_stop(self.progress, self.config.train.steps, row)

    def summarize(self) -> None:
        """Write summary.json and show the closing table."""
        seconds = time.monotonic() - self.started
        rows = self.files.metrics.read() if self.files.is_writer else []
        if not rows:
            return
        first, last = rows[0], rows[-1]
        if last["run/attempt"] != self.files.attempt:
            steps = self.config.train.steps
            self.display.log(f"nothing was left to do: {self.config.run.dir} has its {steps} OPO steps")
            return
        names = [name for name in last if not name.startswith(VOLATILE)]
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
        self.display.summary(*summary_table(self.config, rows, seconds))

    def check_on_policy(self, metrics: StepMetrics) -> None:
        """Refuse a step whose samples are not the policy's, before its optimizer step.

        Those of `rollout.staleness` are not, and were checked when they were sampled.
        """
        if self.config.rollout.staleness == 0:
            self.check_sampled(metrics.mismatch)

    def check_sampled(self, mismatch: Mismatch | None) -> None:
        """Refuse samples whose engine was not the policy of that time."""
        if mismatch is None:
            raise OnPolicyError(
                "the engine recorded no log-probabilities, so on-policyness cannot be measured"
            )
        warning = check_mismatch(self.config.on_policy, mismatch)
        if warning is not None:
            self.display.log(f"warning: {warning}")
