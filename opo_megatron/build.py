"""How a run is put together, or found again, and how it is left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from opo_megatron.checkpoint.checkpoint import (
    CONFIG_FILE,
    RunProgress,
    find_checkpoint,
    load,
    read_extra,
    read_progress,
    read_version,
    run_of,
)
from opo_megatron.checkpoint.retention import Retention
from opo_megatron.checkpoint.weights import CheckpointShards, holds_weights
from opo_megatron.config import Config
from opo_megatron.config.choices import Dtype, EngineName, Kl
from opo_megatron.config.compare import changed_settings, check_resume
from opo_megatron.config.schema import OptimizerConfig
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects, initialize, shutdown
from opo_megatron.errors import Preempted, UserError
from opo_megatron.kernels.fp8 import Scales
from opo_megatron.observe.console import Display
from opo_megatron.observe.loggers import load_wandb
from opo_megatron.observe.run_files import RunFiles
from opo_megatron.policy.policy import Policy
from opo_megatron.resilience.stop import StopRequest
from opo_megatron.resilience.watchdog import Watchdog
from opo_megatron.rollout.engine import RolloutEngine
from opo_megatron.rollout.exact_check import check_device, check_exact
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.memory_sharing import MemorySharing
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.server import write_model_config
from opo_megatron.run import Run
from opo_megatron.tasks import TASKS, Task
from opo_megatron.utils.disk import report_disk_errors
from opo_megatron.weights.fp8_folder import BlockFp8
from opo_megatron.weights.hf_folder import read_weights
from opo_megatron.weights.random_init import random_weights
from opo_megatron.weights.reference_weights import ReferenceWeights
from opo_megatron.weights.stream import WeightSource


@contextmanager
def open_run(config: Config, allowed: Sequence[str] = ()) -> Iterator[Run]:
    """Build or resume a run and leave its process groups at the end.

    Args:
        allowed: keys that may differ from the run's so far where they must not.
    """
    parallel = initialize(config)
    display = Display(active=parallel.rank == 0)
    stop = StopRequest(parallel, config.run.max_minutes)
    stop.listen()
    watchdog = Watchdog(parallel, Path(config.run.dir), config.run.hang_minutes)
    run = None
    try:
        with report_disk_errors(config.run.dir):
            run = _build(config, parallel, display, stop, watchdog, allowed)
            try:
                yield run
            except Preempted as reason:
                _close(run)
                display.log(f"ended before its last step ({reason}) and saved; resume=auto goes on from here")
                shutdown()
                raise
    except Preempted:
        raise
    except BaseException:
        display.close()
        if run is not None:
            run.cancel_pending()
            run.engine.close()
            run.task.close()
            with suppress(OSError):  # on a full disk as before
                run.files.close(failed=True)
        # Leaving waits for ranks that may be waiting for this one; what went wrong must be said first.
        if parallel.world_size == 1:
            shutdown()
        raise
    finally:
        watchdog.close()
        stop.close()
    _close(run)
    shutdown()


def _close(run: Run) -> None:
    run.engine.close()
    run.task.close()
    run.files.close()
    run.display.close()


def _build(
    config: Config,
    parallel: Parallel,
    display: Display,
    stop: StopRequest,
    watchdog: Watchdog,
    allowed: Sequence[str],
) -> Run:
    if config.observe.wandb_project is not None and parallel.rank == 0:
        load_wandb(config)
    if config.rollout.local.exact:
        check_device(parallel)
    task = TASKS[config.task.name](config.task)
    for note in task.notes:
        display.log(note)
    checkpoint = find_checkpoint(config, parallel, display.log)
    progress = read_progress(checkpoint) if checkpoint else RunProgress("warm_start", 0)
    if checkpoint is not None:
        finished_steps = progress.step if progress.phase == "step" else 0
        check_resume(config, checkpoint / CONFIG_FILE, finished_steps, allowed)
    extra = read_extra(checkpoint) if checkpoint else {}
    in_warm_start = progress.phase == "warm_start"
    warms_up = in_warm_start and config.warm_start.steps > 0
    vocab_size = vocabulary_of(config, task)
    reference_weights = None
    if config.observe.kl is Kl.eval or config.algorithm.kl_coefficient:
        reference_weights = ReferenceWeights(Path(config.run.dir), parallel, config.policy.model, vocab_size)
    optimizer = config.warm_start if warms_up else config.optimizer
    policy = start_policy(config, parallel, vocab_size, optimizer, checkpoint is None)
    if checkpoint is not None:
        load(policy, config, checkpoint)
        if reference_weights is not None and not in_warm_start:
            reference_weights.check(run_of(checkpoint))
        display.log(f"resumed from {checkpoint}")
        if changed := changed_settings(config, checkpoint / CONFIG_FILE):
            display.log(f"other settings than before: {', '.join(map(str, changed))}")
    elif config.policy.init_from is not None:
        display.log(f"starts from the weights of {config.policy.init_from}")
    files = RunFiles(config, parallel.rank == 0, progress, checkpoint)
    watchdog.start()
    policy.on_micro_batch = watchdog.progress
    if reference_weights is not None and checkpoint is not None and not in_warm_start:
        reference_weights.take_over(run_of(checkpoint))
    is_enabled = shares_memory(config, parallel)
    if is_enabled:  # a server takes what it finds free when it starts
        policy.memory.free_gradients()
        policy.memory.offload_optimizer()
    engine = _start_engine(config, parallel, policy, display)
    turns = MemorySharing(policy, engine, parallel, is_enabled)
    turns.before_training()
    step = -1 if in_warm_start else progress.step
    warm_step = progress.step if in_warm_start else config.warm_start.steps
    return Run(
        config,
        parallel,
        task,
        policy,
        engine,
        turns,
        files,
        display,
        stop,
        watchdog,
        Retention(config.checkpoint, extra),
        extra,
        reference_weights,
        step,
        warm_step,
        saved=progress if checkpoint is not None else None,
    )


def build_to_draw(
    config: Config, parallel: Parallel, display: Display, task: Task, vocab_size: int, checkpoint: Path | None
) -> Run:
    """A run that never trains: neither gradients nor an optimizer, and no file is written but the engine's.

    Args:
        checkpoint: whose weights the policy gets; None for the recipe's first ones.
    """
    policy = start_policy(config, parallel, vocab_size, None, checkpoint is None)
    if checkpoint is not None:
        policy.set_weights(CheckpointShards(checkpoint, policy.chunks, policy.table, parallel))
        policy.version = read_version(checkpoint)
    engine = _start_engine(config, parallel, policy, display)
    return Run(
        config,
        parallel,
        task,
        policy,
        engine,
        MemorySharing(policy, engine, parallel, shares_memory(config, parallel)),
        RunFiles(config, False, RunProgress("warm_start", 0), checkpoint),
        display,
        StopRequest(parallel, 0.0),
        Watchdog(parallel, Path(config.run.dir), config.run.hang_minutes),
        Retention(config.checkpoint, {}, is_off=True),
        {},
    )


def shares_memory(config: Config, parallel: Parallel) -> bool:
    """Whether policy and engine use the same memory and take turns with it."""
    settings = config.rollout.sglang
    if config.rollout.engine is not EngineName.sglang or settings.urls:
        return False
    return parallel.device.type == "cuda" if settings.share_memory is None else settings.share_memory


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
    config: Config,
    parallel: Parallel,
    vocab_size: int,
    optimizer: OptimizerConfig | None,
    needs_weights: bool,
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


def _start_engine(config: Config, parallel: Parallel, policy: Policy, display: Display) -> RolloutEngine:
    """The recipe's engine, without weights."""
    if config.rollout.engine is EngineName.local:
        dtype = torch.bfloat16 if config.policy.dtype is Dtype.bf16 else torch.float32
        slots = config.rollout.local.slots
        exact = config.rollout.local.exact
        engine = LocalEngine(config.policy.model, policy.vocab_size, dtype, parallel.device, slots, exact)
        if exact and policy.optimizer is not None:  # the promise is about the training pass
            display.status("testing that engine and policy agree bit for bit")
            compared = check_exact(config, policy, engine, parallel)
            display.log(
                f"exact mode: {compared} log-probabilities of engine and policy are equal bit for bit"
            )
        return engine
    model_dir = Path(config.run.dir) / "sglang" / "model"
    fp8 = None
    if config.rollout.sglang.fp8:  # with Transformer Engine's scales, so that the bytes are the trainer's
        fp8 = BlockFp8(replace(config.policy.model, vocab_size=policy.vocab_size), Scales.power_of_two)
    if parallel.rank == 0:
        write_model_config(config, policy.vocab_size, model_dir, fp8.config if fp8 else None)
    all_gather_objects(parallel, None)  # no server starts before the file is there
    return SglangEngine(config, parallel, model_dir, display.status, fp8)
