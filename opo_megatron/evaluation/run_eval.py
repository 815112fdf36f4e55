"""What `opo eval` does: weights into an engine, answers to every task, measures, files, a table.

The engine, the sync with its probe and the drawing are those of training; the policy has no optimizer and
no gradients.  Every task's answers are on disk before the next one is begun.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opo_megatron.algorithm.pass_at_k import bootstrap_interval
from opo_megatron.batch.rollouts import FINISH_LENGTH, Rollouts
from opo_megatron.batch.stats import gather_to_rank0
from opo_megatron.build import build_to_draw
from opo_megatron.checkpoint.checkpoint import damage_of, find_checkpoint, read_vocabulary, run_of
from opo_megatron.cli.eval import Source
from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects, initialize, shutdown
from opo_megatron.errors import UserError
from opo_megatron.evaluation.evaluate import answer, evaluation_problems, evaluation_sampling
from opo_megatron.evaluation.metrics import ResponseMetrics, measure_responses
from opo_megatron.observe.console import Display
from opo_megatron.run import Run
from opo_megatron.tasks import TASKS, Prompt, Task
from opo_megatron.tasks.benchmarks import HELD_OUT, Benchmark, check_vocabulary
from opo_megatron.utils.disk import report_disk_errors

WORK = "work"
"""Folder, in that of the results, of what is there only while it is worked: rank status, server logs."""

WITH_MEANING = 2
"""Tasks beside which a terminal has room for what each line means."""


@dataclass(frozen=True)
class EvalTask:
    """What is to be evaluated, and where results go."""

    source: Source
    benchmarks: Sequence[Benchmark]
    problems: int | None
    """Per task; None is eval.problems of the recipe's own, and all of others."""
    out: Path | None
    """None is RUN/eval/CHECKPOINT."""


def evaluate_weights(config: Config, request: EvalTask) -> None:
    """Answer, measure and write; a collective of all ranks."""
    with _opened(config, request) as (run, tasks, folder, weights):
        run.synchronize()
        results: dict[str, Any] = {}
        measured: dict[str, ResponseMetrics] = {}
        for name, task in tasks.items():
            measured[name] = measures = _evaluate_task(run, name, task, request.problems, folder)
            results[name] = to_json(measures)
            if run.parallel.rank == 0:
                sampling = _sampling_of(run.config)
                _write_json(
                    folder / "eval.json", {"checkpoint": weights, "sampling": sampling, "tasks": results}
                )
        run.display.close()
        run.display.summary(f"{weights}; everything is in {folder}", *table(measured, results))


def _evaluate_task(run: Run, name: str, task: Task, count: int | None, folder: Path) -> ResponseMetrics:
    """Measures of one task's answers, which rank 0 writes."""
    if count is None:
        count = run.config.eval.problems if name == HELD_OUT else task.size("held_out")
    problems = evaluation_problems(task, count)
    samples, sampling = run.config.eval.samples_per_problem, evaluation_sampling(run)
    if name != HELD_OUT:  # ids of problems begin at 0 in every task
        sampling = replace(sampling, seed=(*sampling.seed, zlib.crc32(name.encode())))
    run.watchdog.enter(f"answering {name}")
    rollouts, summary = answer(run, task, problems, samples, sampling, name)
    run.watchdog.enter(f"measuring {name}")
    run.display.status(f"{name}  measuring")
    measures = measure_responses(run.parallel, rollouts, summary, samples, sampling)
    everything = gather_to_rank0(run.parallel, rollouts)
    if everything is not None:
        _write_samples(folder / f"samples_{name}.jsonl", task, problems, everything)
    return measures


# ---------------------------------------------------------------------- opening and leaving


@contextmanager
def _opened(config: Config, request: EvalTask) -> Iterator[tuple[Run, dict[str, Task], Path, str]]:
    """The engine without weights, the tasks, the folder of the results, and the name of the weights."""
    parallel = initialize(config)
    display = Display(active=parallel.rank == 0)
    run: Run | None = None
    tasks: dict[str, Task] = {}
    folder: Path | None = None
    try:
        checkpoint = _checkpoint(config, request.source, parallel, display)
        folder = request.out or _default_folder(request.source, checkpoint)
        config = replace(config, run=replace(config.run, dir=str(folder / WORK)))
        with report_disk_errors(folder):
            _make_room(folder, parallel)
            for benchmark in request.benchmarks:
                is_own = benchmark.source is None
                tasks[benchmark.name] = (
                    TASKS[config.task.name](config.task) if is_own else benchmark.task(config.task)
                )
                for note in tasks[benchmark.name].notes:
                    display.log(f"{benchmark.name}: {note}")
            first = next(iter(tasks.values()))
            rows = config.policy.model.vocab_size or first.vocab_size
            if checkpoint is not None:
                rows = read_vocabulary(checkpoint)
            check_vocabulary(list(tasks.items()), config.task, rows)
            run = build_to_draw(config, parallel, display, first, rows, checkpoint)
            run.watchdog.start()
            start = config.policy.init_from or f"the random start of {request.source.recipe}"
            yield run, tasks, folder, str(checkpoint or start)
        run.watchdog.close()
        _close(run, tasks)
        all_gather_objects(parallel, None)  # nobody writes there any more
        if parallel.rank == 0:
            shutil.rmtree(folder / WORK, ignore_errors=True)
    except BaseException:
        display.close()
        if run is not None:
            run.watchdog.close()
        _close(run, tasks)
        if parallel.rank == 0 and folder is not None:
            with suppress(OSError):  # only where both are empty
                (folder / WORK).rmdir()
                folder.rmdir()
        # Leaving waits for ranks that may be waiting for this one; what went wrong must be said first.
        if parallel.world_size == 1:
            shutdown()
        raise
    shutdown()


def _close(run: Run | None, tasks: dict[str, Task]) -> None:
    if run is not None:
        run.engine.close()
    for task in tasks.values():
        task.close()


def _default_folder(source: Source, checkpoint: Path | None) -> Path:
    assert checkpoint is not None, "the command line gives a recipe's results a folder"
    return (source.run or run_of(checkpoint)) / "eval" / checkpoint.name


def _checkpoint(config: Config, source: Source, parallel: Parallel, display: Display) -> Path | None:
    """The checkpoint to evaluate, its files checked; None for a recipe's first weights."""
    if source.checkpoint is not None:
        if (reason := damage_of(source.checkpoint, parallel)) is not None:
            raise UserError(f"{source.checkpoint} {reason}; evaluate another one")
        return source.checkpoint
    if source.run is None:
        return None
    newest = replace(config, resume="auto", run=replace(config.run, dir=str(source.run)))
    found = find_checkpoint(newest, parallel, display.log)
    if found is None:
        raise UserError(f"the run {source.run} has no checkpoint yet; wait for one, or name another run")
    return found


def _make_room(folder: Path, parallel: Parallel) -> None:
    """The folder of the results, with nothing in it but what an evaluation that broke off has left.

    Raises:
        UserError: on all ranks, where it holds something.
    """
    reason = None
    if parallel.rank == 0:
        if folder.exists() and not folder.is_dir():
            reason = "is a file"
        elif folder.is_dir() and (there := sorted({path.name for path in folder.iterdir()} - {WORK})):
            reason = f"holds {there[0]}"
        else:
            (folder / WORK).mkdir(parents=True, exist_ok=True)
    reason = all_gather_objects(parallel, reason)[0]
    if reason is not None:
        raise UserError(
            f"the folder of the results {folder} {reason}; name another one with --out, or move it away"
        )


# ---------------------------------------------------------------------- results


def to_json(measures: ResponseMetrics) -> dict[str, Any]:
    """One task's entry in eval.json; what was not measured is null."""
    intervals = {}
    for k, values in measures.pass_at_k().items():
        low, high = bootstrap_interval(values)
        intervals[str(k)] = {"value": float(values.mean()), "low": low, "high": high}
    return {
        "problems": measures.problems,
        "samples": measures.samples,
        "reward_mean": measures.accuracy,
        "pass@k": intervals,
        "length_mean": measures.length_mean,
        "truncation_rate": measures.truncation_rate,
        "self_bleu": measures.self_bleu,
        "rep_4": measures.rep_4,
        "entropy": measures.entropy,
    }


def _sampling_of(config: Config) -> dict[str, Any]:
    """How answers were drawn."""
    settings = config.eval
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_response_tokens": config.rollout.max_response_tokens,
        "seed": config.run.seed,
        "engine": config.rollout.engine.value,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def _write_samples(path: Path, task: Task, problems: Sequence[Prompt], rollouts: Rollouts) -> None:
    """A line per problem with all its answers, from those of all ranks."""
    assert rollouts.rewards is not None
    samples: list[list[dict[str, Any]]] = [[] for _ in problems]
    columns = (rollouts.groups, rollouts.rewards, rollouts.response_lengths, rollouts.finish_reasons)
    for response, group, reward, length, reason in zip(
        rollouts.responses(), *(column.tolist() for column in columns), strict=True
    ):
        finish = "length" if reason == FINISH_LENGTH else "stop"
        text = task.decode(response)
        samples[group].append({"text": text, "reward": reward, "length": length, "finish_reason": finish})
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for problem, own in zip(problems, samples, strict=True):
            row = {"problem": problem.text, "answer": problem.answer, "samples": own}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def table(
    measured: dict[str, ResponseMetrics], results: dict[str, Any]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """(lines of (what, a value per task, what it means), the tasks' names)."""

    def line(what: str, shape: str, name: str, meaning: str) -> tuple[str, ...]:
        values = [result[name] for result in results.values()]
        return (what, *("" if value is None else shape.format(value) for value in values), meaning)

    def pass_at(k: str) -> tuple[str, ...]:
        found = [result["pass@k"][k] for result in results.values()]
        values = [f"{one['value']:.1%} [{one['low']:.1%}, {one['high']:.1%}]" for one in found]
        meaning = "an answer is right" if k == "1" else f"one of {k} answers is"
        return (f"pass@{k}", *values, f"chance that {meaning}, with its 95 % interval")

    ks = [str(k) for k in next(iter(measured.values())).pass_at_k()]
    lines = [
        line("problems", "{}", "problems", f"with {next(iter(measured.values())).samples} answers each"),
        *map(pass_at, ks),
        line("length", "{:.1f}", "length_mean", "tokens per answer, stop token included"),
        line("cut", "{:.1%}", "truncation_rate", "answers that were cut at rollout.max_response_tokens"),
        line("Self-BLEU", "{:.3f}", "self_bleu", "how alike the answers to a problem are; 1 is all the same"),
        line("Rep-4", "{:.3f}", "rep_4", "share of an answer's 4-grams that stood in it before"),
        line("entropy", "{:.3f}", "entropy", "nats per token, −mean log π of the tokens drawn"),
    ]
    is_narrow = len(results) <= WITH_MEANING
    return [line if is_narrow else line[:-1] for line in lines], list(results)
