"""How a run is assembled or resumed, and how it is left: normally, told to stop, or on an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from opo_megatron.algorithm.config import keeps_zero_variance
from opo_megatron.checkpoint.kept_rollouts import KeptRollouts, read_kept
from opo_megatron.checkpoint.load import load
from opo_megatron.checkpoint.progress import (
    CONFIG_FILE,
    RunProgress,
    abandon_later,
    find_checkpoint,
    read_estimator_state,
    read_progress,
    read_version,
    run_of,
)
from opo_megatron.checkpoint.retention import Retention
from opo_megatron.checkpoint.saver import CheckpointSaver
from opo_megatron.checkpoint.weights import CheckpointShards, holds_weights
from opo_megatron.config import Config
from opo_megatron.config.arithmetic import shares_memory
from opo_megatron.config.choices import Dtype, EngineName, Kl
from opo_megatron.config.compare import INPUTS, changed_settings, check_inputs, check_resume
from opo_megatron.config.rules.exact import exact_switch
from opo_megatron.config.rules.overlap import check_overlap_devices
from opo_megatron.config.schema import OptimizerConfig
from opo_megatron.distributed.process_groups import (
    Parallel,
    all_gather_objects,
    choose_device,
    initialize,
    shutdown,
)
from opo_megatron.errors import Preempted, UserError
from opo_megatron.observe.console import Display
from opo_megatron.observe.loggers import load_wandb
from opo_megatron.observe.off_policy import off_policy_words
from opo_megatron.observe.run_files import RunFiles
from opo_megatron.policy.device import check_device
from opo_megatron.policy.policy import Policy
from opo_megatron.resilience.stop import StopRequest
from opo_megatron.resilience.watchdog import Watchdog
from opo_megatron.rollout.environments import WorkerEnvironments, open_environments
from opo_megatron.rollout.exact_check import check_exact, check_exact_device
from opo_megatron.rollout.generation import Generation
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.memory_sharing import MemorySharing
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.server import write_model_config
from opo_megatron.rollout.sglang.server_checks import check_servers_device
from opo_megatron.run import Run
from opo_megatron.tasks import Task, make_task
from opo_megatron.tasks.stop_tokens import check_stop_tokens, how_responses_end
from opo_megatron.tasks.user_estimator import load_estimator
from opo_megatron.utils.disk import report_disk_errors
from opo_megatron.utils.start_folder import absolute, shown
from opo_megatron.weights.fp8_folder import engine_quantization
from opo_megatron.weights.hf_folder import read_weights
from opo_megatron.weights.random_init import random_weights
from opo_megatron.weights.reference_weights import ReferenceWeights
from opo_megatron.weights.stream import WeightSource


@contextmanager
def joined_ranks(config: Config) -> Iterator[tuple[Parallel, Display]]:
    """Join the process groups, and leave them at the end; every command that needs a policy runs in this."""
    check_device(config.policy, choose_device(config.policy.device))
    parallel = initialize(config)
    display = Display(active=parallel.rank == 0)
    try:
        yield parallel, display
    except Preempted:
        shutdown()
        raise
    except BaseException:
        display.close()
        # Shutting down waits for ranks that may be waiting for this one: the error is printed first.
        if parallel.world_size == 1:
            shutdown()
        raise
    display.close()
    shutdown()


@contextmanager
def open_run(config: Config, allowed: Sequence[str] = (), saves: bool = True) -> Iterator[Run]:
    """Build or resume a run, and close what it holds at the end.

    Args:
        allowed: keys that may differ from the run's so far where they must not.
        saves: False writes no checkpoint.
    """
    with (
        joined_ranks(config) as (parallel, display),
        report_disk_errors(absolute(config.run.dir)),
        ExitStack() as resources,
    ):
        stop = StopRequest(parallel, config.run.max_minutes)
        stop.listen()
        resources.callback(stop.close)
        run = _build(config, parallel, display, stop, allowed, saves, resources)
        try:
            yield run
        except Preempted as reason:
            run.saver.save_before_stopping(run.progress)
            display.close()
            display.log(f"stopped before its last step ({reason}) and saved; resume=auto continues from here")
            raise
        except BaseException:
            display.close()
            run.saver.cancel_pending()
            raise


def _build(
    config: Config,
    parallel: Parallel,
    display: Display,
    stop: StopRequest,
    allowed: Sequence[str],
    saves: bool,
    resources: ExitStack,
) -> Run:
    watchdog = Watchdog(parallel, absolute(config.run.dir), config.run.hang_minutes)
    resources.callback(watchdog.close)
    watchdog.start()
    _check_environment(config, parallel)
    watchdog.enter("loading the task")
    task = _open_task(config, display, resources)
    environments = _open_environments(config, task, display, resources)
    watchdog.enter("checking checkpoints")
    checkpoint = find_checkpoint(config, parallel, display.log)
    estimator = load_estimator(config.algorithm.baseline)
    inputs = task.fingerprint | (estimator.fingerprint if estimator is not None else {})
    inputs |= environments.fingerprint if environments is not None else {}
    progress, state = _read_checkpoint(config, inputs, checkpoint, allowed)
    watchdog.enter("loading weights")
    in_warm_start = progress.phase == "warm_start"
    vocab_size = vocabulary_of(config, task)
    reference = _reference_weights(config, parallel, vocab_size)
    optimizer = config.warm_start if in_warm_start and config.warm_start.steps > 0 else config.optimizer
    policy = start_policy(config, parallel, vocab_size, optimizer, checkpoint is None)
    if checkpoint is not None:
        load(policy, config, checkpoint)
        if reference is not None and not in_warm_start:
            reference.check(run_of(checkpoint))
    _log_start(config, checkpoint, display)
    files = _open_files(config, parallel, progress, checkpoint, resources)
    watchdog.show()
    policy.on_micro_batch = watchdog.progress
    if reference is not None and checkpoint is not None and not in_warm_start:
        reference.adopt(run_of(checkpoint))
    generation = open_generation(config, parallel, policy, display, watchdog, resources)
    generation.stop, generation.environments = stop, environments
    generation.memory.before_training()
    saver = CheckpointSaver(
        config=config,
        policy=policy,
        state=state,
        kept=_kept_rollouts(config, parallel, progress, checkpoint),
        retention=Retention(config.checkpoint, state, is_off=not saves),
        stop=stop,
        memory_for_saving=generation.memory.saving,
        is_writer=files.is_writer,
        enter_phase=watchdog.enter,
        log=display.log,
        show_status=display.status,
        saved=progress if checkpoint is not None else None,
    )
    return Run(
        config=config,
        parallel=parallel,
        task=task,
        policy=policy,
        generation=generation,
        saver=saver,
        files=files,
        display=display,
        watchdog=watchdog,
        reference_weights=reference,
        estimator=estimator,
        step=-1 if in_warm_start else progress.step,
        warm_step=progress.step if in_warm_start else config.warm_start.steps,
    )


def _open_environments(
    config: Config, task: Task, display: Display, resources: ExitStack
) -> WorkerEnvironments | None:
    """What answers the policy between its turns, closed with `resources`; None for single turns."""
    environments = open_environments(config, task, display.log)
    if environments is not None:
        resources.callback(environments.close)
    return environments


def _check_environment(config: Config, parallel: Parallel) -> None:
    """Refuse what this machine cannot do, before anything is loaded."""
    if config.observe.wandb_project is not None and parallel.rank == 0:
        load_wandb(config)
    check_exact_device(config, parallel)
    if config.rollout.engine is EngineName.sglang:
        check_servers_device(config.rollout.sglang, parallel.device)
        check_overlap_devices(config, parallel.device.type == "cuda")


def _open_task(config: Config, display: Display, resources: ExitStack) -> Task:
    """The recipe's task, ready to grade; closed with `resources`."""
    task = make_task(config.task)
    resources.callback(task.close)
    task.start()
    for note in task.notes:
        display.log(note)
    display.log(how_responses_end(task))
    return task


def _read_checkpoint(
    config: Config, now: dict[str, str], checkpoint: Path | None, allowed: Sequence[str]
) -> tuple[RunProgress, dict[str, Any]]:
    """How far the run is, and what it remembers beyond the weights.

    Args:
        now: hashes of what this attempt reads beside the recipe.

    Raises:
        UserError: where a setting, or what the task reads, has changed and must not.
    """
    progress, state = RunProgress("warm_start", 0), dict[str, Any]()
    if checkpoint is not None:
        progress, state = read_progress(checkpoint), read_estimator_state(checkpoint)
        finished_steps, inputs = progress.step if progress.phase == "step" else 0, state.get(INPUTS, {})
        check_resume(config, checkpoint / CONFIG_FILE, finished_steps, allowed, inputs)
        check_inputs(config, inputs, now, checkpoint, allowed)
    state[INPUTS] = now
    return progress, state


def _kept_rollouts(
    config: Config, parallel: Parallel, progress: RunProgress, checkpoint: Path | None
) -> KeptRollouts:
    """The rollouts of the checkpoint that later steps train on.

    Raises:
        UserError: where they are of another staleness than the recipe's.
    """
    if checkpoint is None or progress.phase == "warm_start":
        return KeptRollouts()
    kept, staleness = read_kept(parallel, checkpoint), config.rollout.staleness
    if len(kept.waiting) != staleness:
        raise UserError(
            f"rollout.staleness is {staleness}, but in the checkpoint {shown(checkpoint)} the rollouts of "
            f"{len(kept.waiting)} steps wait; set it to {len(kept.waiting)}, or start another run"
        )
    return kept


def _reference_weights(config: Config, parallel: Parallel, vocab_size: int) -> ReferenceWeights | None:
    """The initial weights, for a run that measures or penalizes its KL divergence from them."""
    if config.observe.kl is Kl.eval or config.algorithm.kl_coefficient:
        return ReferenceWeights(absolute(config.run.dir), parallel, config.policy.model, vocab_size)
    return None


def _log_start(config: Config, checkpoint: Path | None, display: Display) -> None:
    if checkpoint is not None:
        display.log(f"resumed from {shown(checkpoint)}")
        if changed := changed_settings(config, checkpoint / CONFIG_FILE):
            display.log(f"changed settings: {', '.join(map(str, changed))}")
    elif config.policy.init_from is not None:
        display.log(f"starts from the weights of {config.policy.init_from}")
    if words := off_policy_words(config.rollout.staleness, config.rollout.replay.method.value):
        display.log(f"{words}: steps train on responses of earlier weights")
    if keeps_zero_variance(config.algorithm):
        display.log(
            f"algorithm.baseline={config.algorithm.baseline} may have a gradient where all rewards of a "
            "group are equal, so no backward pass is skipped"
        )


def _open_files(
    config: Config,
    parallel: Parallel,
    progress: RunProgress,
    checkpoint: Path | None,
    resources: ExitStack,
) -> RunFiles:
    """The run's files, cut to `progress`."""
    in_warm_start = progress.phase == "warm_start"
    files = RunFiles(
        config,
        is_writer=parallel.rank == 0,
        step=-1 if in_warm_start else progress.step,
        warm_step=progress.step if in_warm_start else None,
        source=run_of(checkpoint) if checkpoint is not None else None,
    )
    if files.is_writer:
        abandon_later(files.dir, progress, files.attempt)

    def close(kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None or issubclass(kind, Preempted):
            files.close()
            return
        with suppress(OSError):  # a full disk fails again here
            files.close(failed=True)

    resources.push(close)
    return files


def open_generation(
    config: Config,
    parallel: Parallel,
    policy: Policy,
    display: Display,
    watchdog: Watchdog,
    resources: ExitStack,
) -> Generation:
    """The recipe's engine, without weights, and what surrounds it; closed with `resources`."""
    shares = shares_memory(config, on_gpu=parallel.device.type == "cuda")
    if shares:  # a server takes the memory that it finds free when it starts
        policy.memory.make_room()
    watchdog.enter("starting the engine")

    def show_status(line: str) -> None:
        watchdog.progress()  # a server that starts has its own time limit
        display.status(line)

    engine = _start_engine(config, parallel, policy, show_status, display.log)
    resources.callback(engine.close)
    _check_exact(config, policy, engine, parallel, display)
    return Generation(
        config=config,
        parallel=parallel,
        policy=policy,
        engine=engine,
        memory=MemorySharing(policy, engine, parallel, is_enabled=shares),
        display=display,
        watchdog=watchdog,
    )


def _start_engine(
    config: Config,
    parallel: Parallel,
    policy: Policy,
    show_status: Callable[[str], None],
    log: Callable[[str], None],
) -> LocalEngine | SglangEngine:
    if config.rollout.engine is EngineName.local:
        dtype = torch.bfloat16 if config.policy.dtype is Dtype.bf16 else torch.float32
        return LocalEngine(
            config.policy.model,
            policy.vocab_size,
            dtype,
            parallel.device,
            config.rollout.local.slots,
            config.rollout.local.exact,
            config.policy.exact_sum_parts,
        )
    model_dir = absolute(config.run.dir) / "sglang" / "model"
    fp8 = engine_quantization(config, policy.vocab_size)
    if parallel.rank == 0:
        write_model_config(config, policy.vocab_size, model_dir, fp8.config if fp8 else None)
    all_gather_objects(parallel, None)  # no server starts before the file is there
    return SglangEngine(config, parallel, model_dir, show_status, fp8, log)


def _check_exact(
    config: Config, policy: Policy, engine: LocalEngine | SglangEngine, parallel: Parallel, display: Display
) -> None:
    """Test exact mode where it is on; the promise is about the training pass."""
    if exact_switch(config) is not None and policy.optimizer is not None:
        display.status("testing that engine and policy agree bit for bit")
        compared = check_exact(config, policy, engine, parallel)
        display.log(f"exact mode: {compared} log-probabilities of engine and policy are equal bit for bit")


def vocabulary_of(config: Config, task: Task) -> int:
    """Rows of the policy's embedding.

    Raises:
        UserError: where the task has tokens, or stops at one, that the policy has no row for.
    """
    rows = config.policy.model.vocab_size
    if rows is not None and task.vocab_size > rows:
        raise UserError(
            f"the task's tokenizer has {task.vocab_size} tokens, but the policy's vocabulary is "
            f"policy.model.vocab_size={rows}; set task.tokenizer to the folder of the model's own tokenizer"
        )
    rows = task.vocab_size if rows is None else rows
    check_stop_tokens(task.stop_tokens, rows)
    return rows


def start_policy(
    config: Config,
    parallel: Parallel,
    vocab_size: int,
    optimizer: OptimizerConfig | None,
    needs_weights: bool,
) -> Policy:
    """The policy with its initial weights: random, or those of `policy.init_from`."""
    folder = absolute(config.policy.init_from) if config.policy.init_from is not None else None
    weights: WeightSource | None = None
    if needs_weights and folder is None:
        weights = random_weights(config.policy.model, vocab_size, config.run.seed)
    elif needs_weights and folder is not None and not holds_weights(folder):
        weights = read_weights(folder, config.policy.model).__getitem__
    policy = Policy(config, vocab_size, parallel, optimizer, weights)
    if needs_weights and folder is not None and holds_weights(folder):
        policy.set_weights(CheckpointShards(folder, policy.chunks, policy.param_mapping, parallel))
    return policy


def frozen_policy(config: Config, parallel: Parallel, vocab_size: int, checkpoint: Path | None) -> Policy:
    """A policy that never trains, with neither gradients nor an optimizer.

    Args:
        checkpoint: whose weights it gets; None for the recipe's initial ones.
    """
    policy = start_policy(config, parallel, vocab_size, None, checkpoint is None)
    if checkpoint is not None:
        policy.set_weights(CheckpointShards(checkpoint, policy.chunks, policy.param_mapping, parallel))
        policy.version = read_version(checkpoint)
    return policy
