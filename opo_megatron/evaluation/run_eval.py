"""What `opo eval` does: weights into an engine, responses to every task, metrics, files, a table.

The engine, the sync with its probe and the generation are those of training; the policy has neither an
optimizer nor gradients.  Every task's responses are on disk before the next one starts.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opo_megatron.batch.redistribute import gather_to_rank0
from opo_megatron.build import frozen_policy, joined_ranks, open_generation
from opo_megatron.checkpoint.progress import damage_of, find_checkpoint, read_vocabulary, run_of
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import UserError
from opo_megatron.evaluation.evaluate import evaluation_problems, evaluation_sampling, generate_eval
from opo_megatron.evaluation.metrics import ResponseMetrics, measure_responses
from opo_megatron.evaluation.results import (
    results_table,
    sampling_settings,
    to_json,
    write_json,
    write_samples,
)
from opo_megatron.evaluation.source import Source
from opo_megatron.observe.console import Display
from opo_megatron.resilience.watchdog import Watchdog
from opo_megatron.rollout.environments import open_environments
from opo_megatron.rollout.generation import Generation
from opo_megatron.tasks import Task, make_task
from opo_megatron.tasks.benchmarks import HELD_OUT, Benchmark, check_vocabulary
from opo_megatron.tasks.environment import with_openings
from opo_megatron.tasks.stop_tokens import how_responses_end
from opo_megatron.utils.disk import report_disk_errors
from opo_megatron.utils.start_folder import absolute, shown

WORK = "work"
"""Subfolder of the results for what exists only while the evaluation runs: rank status, server logs."""


@dataclass(frozen=True)
class EvalTask:
    """What is evaluated, and where results go."""

    source: Source
    benchmarks: Sequence[Benchmark]
    problems: int | None
    """Per task; None is eval.problems of the recipe's own, and all of others."""
    out: Path | None
    """None is RUN/eval/CHECKPOINT."""


@dataclass(frozen=True)
class _Evaluation:
    """What `opo eval` uses of a run."""

    generation: Generation
    tasks: dict[str, Task]
    folder: Path
    weights: str
    """Their name."""


def evaluate_weights(config: Config, request: EvalTask) -> None:
    """Generate, measure and write; a collective of all ranks."""
    with _opened(config, request) as evaluation:
        generation, folder = evaluation.generation, evaluation.folder
        generation.synchronize()
        results: dict[str, Any] = {"checkpoint": evaluation.weights, "sampling": {}, "tasks": {}}
        results["sampling"] = sampling_settings(generation.config)
        measured: dict[str, ResponseMetrics] = {}
        for name, task in evaluation.tasks.items():
            measured[name] = metrics = _evaluate_task(generation, name, task, request.problems, folder)
            results["tasks"][name] = to_json(metrics)
            if generation.parallel.rank == 0:
                write_json(folder / "eval.json", results)
        generation.display.close()
        title = f"{evaluation.weights}; everything is in {shown(folder)}"
        generation.display.summary(title, *results_table(measured, results["tasks"]))


def _evaluate_task(
    generation: Generation, name: str, task: Task, count: int | None, folder: Path
) -> ResponseMetrics:
    """Metrics of one task's responses, which rank 0 writes."""
    config, parallel, watchdog = generation.config, generation.parallel, generation.watchdog
    if count is None:
        count = config.eval.problems if name == HELD_OUT else task.size("held_out")
    problems = evaluation_problems(task, count)
    samples, sampling = config.eval.samples_per_problem, evaluation_sampling(config, task)
    if name != HELD_OUT:  # ids of problems begin at 0 in every task
        sampling = replace(sampling, seed=(*sampling.seed, zlib.crc32(name.encode())))
    watchdog.enter(f"generating for {name}")
    environments = open_environments(config, task, generation.display.log)
    generation.environments = environments
    try:
        rollouts, stats = generate_eval(generation, task, problems, samples, sampling, name)
    finally:
        if environments is not None:
            environments.close()
    watchdog.enter(f"measuring {name}")
    generation.display.status(f"{name}  measuring")
    metrics = measure_responses(parallel, rollouts, stats, samples, sampling)
    all_rollouts = gather_to_rank0(parallel, rollouts)
    if all_rollouts is not None:
        write_samples(folder / f"samples_{name}.jsonl", task, problems, all_rollouts)
    return metrics


# ---------------------------------------------------------------------- opening


@contextmanager
def _opened(config: Config, request: EvalTask) -> Iterator[_Evaluation]:
    """The engine without weights, the tasks, the folder of the results, and the name of the weights."""
    with joined_ranks(config) as (parallel, display):
        checkpoint = _checkpoint(config, request.source, parallel, display)
        folder = absolute(request.out or _default_folder(request.source, checkpoint))
        config = replace(config, run=replace(config.run, dir=str(folder / WORK)))
        with report_disk_errors(folder), _work_folder(folder, parallel), ExitStack() as resources:
            watchdog = Watchdog(parallel, folder / WORK, config.run.hang_minutes)
            resources.callback(watchdog.close)
            watchdog.start()
            watchdog.enter("loading")
            tasks = _open_tasks(config, request.benchmarks, display, resources)
            rows = config.policy.model.vocab_size or next(iter(tasks.values())).vocab_size
            if checkpoint is not None:
                rows = read_vocabulary(checkpoint)
            check_vocabulary(list(tasks.items()), config.task, rows)
            policy = frozen_policy(config, parallel, rows, checkpoint)
            watchdog.show()
            generation = open_generation(config, parallel, policy, display, watchdog, resources)
            initial = config.policy.init_from or f"the random initial weights of {request.source.recipe}"
            yield _Evaluation(generation, tasks, folder, shown(checkpoint) if checkpoint else initial)


def _open_tasks(
    config: Config, benchmarks: Sequence[Benchmark], display: Display, resources: ExitStack
) -> dict[str, Task]:
    tasks = {}
    for benchmark in benchmarks:
        is_own = benchmark.source is None
        settings = config.task
        task = make_task(settings) if is_own else with_openings(benchmark.task(settings), settings)
        resources.callback(task.close)
        task.start()
        for note in task.notes:
            display.log(f"{benchmark.name}: {note}")
        tasks[benchmark.name] = task
    for line in dict.fromkeys(map(how_responses_end, tasks.values())):
        display.log(line)
    return tasks


def _default_folder(source: Source, checkpoint: Path | None) -> Path:
    assert checkpoint is not None, "the command line gives a recipe's results a folder"
    return (source.run or run_of(checkpoint)) / "eval" / checkpoint.name


def _checkpoint(config: Config, source: Source, parallel: Parallel, display: Display) -> Path | None:
    """The checkpoint to evaluate, its files checked; None for a recipe's initial weights."""
    if source.checkpoint is not None:
        if (reason := damage_of(source.checkpoint, parallel)) is not None:
            raise UserError(f"{source.checkpoint} {reason}; evaluate another one")
        return absolute(source.checkpoint)
    if source.run is None:
        return None
    newest = replace(config, resume="auto", run=replace(config.run, dir=str(source.run)))
    checkpoint = find_checkpoint(newest, parallel, display.log)
    if checkpoint is None:
        raise UserError(f"the run {source.run} has no checkpoint yet; wait for one, or name another run")
    return checkpoint


@contextmanager
def _work_folder(folder: Path, parallel: Parallel) -> Iterator[None]:
    """The folder of the results with its subfolder `WORK`, which is removed at the end.

    Raises:
        UserError: on all ranks, where the folder holds more than an interrupted evaluation left.
    """
    reason = None
    if parallel.rank == 0:
        if folder.exists() and not folder.is_dir():
            reason = "is a file"
        elif folder.is_dir() and (held := sorted({path.name for path in folder.iterdir()} - {WORK})):
            reason = f"holds {held[0]}"
        else:
            (folder / WORK).mkdir(parents=True, exist_ok=True)
    reason = all_gather_objects(parallel, reason)[0]
    if reason is not None:
        raise UserError(
            f"the folder of the results {folder} {reason}; name another one with --out, or move it away"
        )
    try:
        yield
    except BaseException:
        if parallel.rank == 0:
            with suppress(OSError):  # removes only what is empty
                (folder / WORK).rmdir()
                folder.rmdir()
        raise
    all_gather_objects(parallel, None)  # no rank writes there any more
    if parallel.rank == 0:
        shutil.rmtree(folder / WORK, ignore_errors=True)
