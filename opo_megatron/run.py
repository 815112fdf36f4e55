"""One run: its parts, where it stands, and what happens when a step is finished."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from opo_megatron.algorithm.on_policy import check_mismatch
from opo_megatron.config import Config
from opo_megatron.config.schema import Dtype, Kl, OptimizerConfig
from opo_megatron.disk import writing
from opo_megatron.errors import OnPolicyError, UserError
from opo_megatron.observe.boards import load_wandb
from opo_megatron.observe.closing import closing_table
from opo_megatron.observe.console import Display
from opo_megatron.observe.rows import Row
from opo_megatron.observe.run_files import RunFiles
from opo_megatron.observe.step_metrics import memory_metrics, throughput_metrics
from opo_megatron.policy.checkpoint import (
    RunProgress,
    find_checkpoint,
    load,
    read_progress,
    run_of,
    save,
)
from opo_megatron.policy.parallel import Parallel, all_gather_objects, initialize, leave
from opo_megatron.policy.policy import Policy
from opo_megatron.policy.step_sums import StepMetrics
from opo_megatron.policy.weights_checkpoint import CheckpointShards, holds_weights
from opo_megatron.rollout.batch import gather_on_first
from opo_megatron.rollout.engine import Progress, RolloutEngine, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.rollouts import Rollouts
from opo_megatron.tasks import TASKS, Prompt, Task
from opo_megatron.tasks.base import PromptOrder, Split
from opo_megatron.weights.hf_folder import read_weights
from opo_megatron.weights.random import random_weights
from opo_megatron.weights.start_weights import StartWeights
from opo_megatron.weights.stream import WeightSource

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
    files: RunFiles
    display: Display
    start_weights: StartWeights | None = None
    """Those of step 0, where the KL to them is measured."""
    step: int = -1
    """Last finished OPO step; step 0 is the evaluation before the first update, −1 is before that."""
    warm_step: int = 0
    """Last finished warm-start step."""
    started: float = field(default_factory=time.monotonic)
    _orders: dict[tuple[int, int], PromptOrder] = field(default_factory=dict)

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
        )

    def progress(self, what: str) -> Progress:
        """Shows an engine's progress under the name `what`."""
        begun = time.monotonic()

        def show(done: int, total: int, tokens: int) -> None:
            rate = tokens / max(1e-9, time.monotonic() - begun)
            text = f"{what}  {done}/{total} responses  {rate:,.0f} tokens/s"
            self.display.status(text, done / max(1, total))

        return show

    def synchronize(self) -> None:
        """Send the policy's weights to the engine."""
        self.engine.update_weights(self.policy.stream_weights(), self.policy.version)

    def keep_start_weights(self) -> None:
        """Write the weights that OPO begins with, where the KL to them is measured."""
        if self.start_weights is not None:
            self.display.status("keeping the start weights")
            self.start_weights.write(self.policy.stream_weights())

    # ------------------------------------------------------------------ finishing a step

    def finish_warm_step(self, row: Row) -> None:
        """Write a warm-start step, then save where it is time to."""
        self.files.write_warm_start(row)
        self.warm_step = row["step"]
        self._save_if_due(RunProgress("warm_start", self.warm_step), self.config.warm_start.steps)

    def finish_step(self, row: Row, rollouts: Rollouts | None = None) -> None:
        """Write an OPO step, then save where it is time to."""
        if rollouts is not None and self.config.observe.save_rollouts:
            self.files.write_rollouts(row["step"], gather_on_first(self.parallel, rollouts))
        self.files.write_step(row | throughput_metrics(row) | memory_metrics())
        self.display.row(row)
        self.step = row["step"]
        if self.step > 0:
            self._save_if_due(RunProgress("step", self.step), self.config.train.steps)

    def _save_if_due(self, progress: RunProgress, last: int) -> None:
        every = self.config.checkpoint.every_steps
        if progress.step == last or (every > 0 and progress.step % every == 0):
            self.display.status(f"saving {progress.folder}")
            save(self.policy, self.config, progress)

    def summarize(self) -> None:
        """Write summary.json and show the closing table."""
        seconds = time.monotonic() - self.started
        rows = self.files.metrics.read() if self.files.writes else []
        if not rows:
            return
        first, last = rows[0], rows[-1]
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


def accept_on_policy(run: Run, metrics: StepMetrics) -> None:
    """Refuse a step whose samples the policy did not draw, before its optimizer step."""
    if metrics.mismatch is None:
        raise OnPolicyError("the engine recorded no log-probabilities, so on-policyness cannot be measured")
    warning = check_mismatch(run.config.on_policy, metrics.mismatch)
    if warning is not None:
        run.display.say(f"warning: {warning}")


@contextmanager
def open_run(config: Config) -> Iterator[Run]:
    """Build or resume a run and leave its process groups at the end."""
    parallel = initialize(config)
    display = Display(active=parallel.rank == 0)
    run = None
    try:
        with writing(config.run.dir):
            run = _build(config, parallel, display)
            yield run
    except BaseException:
        display.close()
        if run is not None:
            with suppress(OSError):  # on a full disk as before
                run.files.close(failed=True)
        # Leaving waits for ranks that may be waiting for this one; what went wrong must be said first.
        if parallel.world_size == 1:
            leave()
        raise
    run.files.close()
    display.close()
    leave()


def _build(config: Config, parallel: Parallel, display: Display) -> Run:
    if config.observe.wandb_project is not None and parallel.rank == 0:
        load_wandb(config)
    task = TASKS[config.task.name](config.task)
    for note in task.notes:
        display.say(note)
    # Folders can look different from different machines: one rank looks, all follow.
    checkpoint = all_gather_objects(parallel, find_checkpoint(config) if parallel.rank == 0 else None)[0]
    progress = read_progress(checkpoint) if checkpoint else RunProgress("warm_start", 0)
    in_warm_start = progress.phase == "warm_start"
    warms_up = in_warm_start and config.warm_start.steps > 0
    vocab_size = vocabulary_of(config, task)
    start_weights = None
    if config.observe.kl is Kl.eval:
        start_weights = StartWeights(Path(config.run.dir), parallel, config.policy.model, vocab_size)
    optimizer = config.warm_start if warms_up else config.optimizer
    policy = start_policy(config, parallel, vocab_size, optimizer, checkpoint is None)
    if checkpoint is not None:
        load(policy, config, checkpoint)
        if start_weights is not None and not in_warm_start:
            start_weights.check(run_of(checkpoint))
        display.say(f"resumed from {checkpoint}")
    elif config.policy.init_from is not None:
        display.say(f"starts from the weights of {config.policy.init_from}")
    dtype = torch.bfloat16 if config.policy.dtype is Dtype.bf16 else torch.float32
    slots = config.rollout.local.slots
    engine = LocalEngine(config.policy.model, policy.vocab_size, dtype, parallel.device, slots)
    files = RunFiles(config, parallel.rank == 0, progress, checkpoint)
    if start_weights is not None and checkpoint is not None and not in_warm_start:
        start_weights.take_over(run_of(checkpoint))
    step = -1 if in_warm_start else progress.step
    warm_step = progress.step if in_warm_start else config.warm_start.steps
    return Run(config, parallel, task, policy, engine, files, display, start_weights, step, warm_step)


def vocabulary_of(config: Config, task: Task) -> int:
    """Rows of the policy's embedding.

    Raises:
        UserError: where the task has tokens that the policy has no row for.
    """
    rows = config.policy.model.vocab_size
    if rows is not None and task.vocab_size > rows:
        raise UserError(
            f"the task's tokenizer has {task.vocab_size} tokens, but the policy's vocabulary is "
            f"policy.model.vocab_size={rows}; set task.tokenizer to the folder of the model's own tokenizer"
        )
    return task.vocab_size if rows is None else rows


def start_policy(
    config: Config, parallel: Parallel, vocab_size: int, optimizer: OptimizerConfig, needs_weights: bool
) -> Policy:
    """The policy with its first weights: random, or those of `policy.init_from`."""
    folder = Path(config.policy.init_from) if config.policy.init_from is not None else None
    weights: WeightSource | None = None
    if needs_weights and folder is None:
        weights = random_weights(config.policy.model, vocab_size, config.run.seed)
    elif needs_weights and folder is not None and not holds_weights(folder):
        weights = read_weights(folder, config.policy.model).__getitem__
    policy = Policy(config, vocab_size, parallel, optimizer, weights)
    if needs_weights and folder is not None and holds_weights(folder):
        policy.set_weights(CheckpointShards(folder, policy.chunks, policy.table, parallel))
    return policy
