"""Compares exactly on-policy training with off-policy objectives, on fresh and on stale rollouts.

    python tools/arena.py --budget-minutes 100       # → records/arena.json, figures; call it again to resume
    python tools/arena.py --size tiny --rows opo grpo    # minutes: tests that it works
    python tools/arena.py --tasks hard_lift long_lift --seeds 5 --folder runs/mine --no-record

Rows are the recipes of recipes/arena.  Each seed has one supervised warm start per task, and every row starts
from its weights, which is checked byte for byte; all rows sample equally many responses.  A row's learning
rate is that of the best held-out accuracy in a short pilot, on a seed that does not count.

The number of runs and the expected minutes are printed before anything long starts, from the time of a step
on this machine.  --budget-minutes cuts seeds first, then rows from the end, and says so.  What is complete is
not run again: call the command again, with the same folder, for what was cut or interrupted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.record import RECORDS, write_record
from paper.arena_plan import (
    PILOT_SEED,
    RATES,
    REFERENCE,
    ROWS,
    SIZES,
    TASKS,
    Plan,
    Times,
    arm_of,
    chosen,
    cut,
    pilot_arm,
    pilot_name,
    pilot_runs,
    run_name,
    seed_runs,
    warm_name,
)
from paper.arena_results import measures_of, paired_results, plot_all, print_results
from paper.arms import OPO, Arm, SeedRuns, check_initial_weights, rows_of, training_samples
from paper.figures import load_pyplot
from reproduce_paper import Job, run_jobs

from opo_megatron.cli.main import Parser, print_error
from opo_megatron.errors import EXIT_USER_ERROR, UserError
from opo_megatron.observe.console import Display
from opo_megatron.observe.metrics_file import MetricsFile
from opo_megatron.report.paired import RULE
from opo_megatron.utils.terminal import prepare_terminal

TIMED_STEPS = 6
"""Steps of the run that measures the time of a step; the first is slower and left out."""


def main(argv: list[str] | None = None) -> int:
    try:
        compare(_parser().parse_args(argv))
    except UserError as error:
        print_error(error)
        return EXIT_USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--budget-minutes", type=float, metavar="M", help="what this call may take; default: all of it")
    add("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)} (default: {next(iter(TASKS))})")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (default: 3)")
    add("--rows", nargs="+", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    add("--size", choices=tuple(SIZES), default="full", help="length of the runs (default: full)")
    add("--jobs", type=int, default=2, metavar="N", help="concurrent runs, one thread each (default: 2)")
    add("--folder", type=Path, metavar="DIR", help="folder of all runs (default: runs/arena_SIZE)")
    add("--no-record", action="store_true", help="write results to DIR, not to records/, as tiny always does")
    return parser


def compare(options: argparse.Namespace) -> None:
    """Measure the time of a step, plan, run what is missing, then write and print the results."""
    plan = _plan(options)
    load_pyplot()  # fails before hours of runs where matplotlib is missing
    folder = (options.folder or Path("runs") / f"arena_{options.size}").resolve()
    started = time.monotonic()
    display = Display(active=True)
    try:
        times = measured_times(folder, plan, options.jobs, display)
        spent = (time.monotonic() - started) / 60
        budget = None if options.budget_minutes is None else options.budget_minutes - spent
        done = complete(folder, plan)
        plan, notes = cut(plan, times, options.jobs, budget, done)
        for line in (*_announcement(plan, times, options.jobs, done), *notes):
            display.log(line)
        rates = run_all(folder, plan, times, options.jobs, display)
    finally:
        display.close()
    target = folder if options.no_record or options.size != "full" else RECORDS
    write_results(folder, plan, rates, notes, target, time.monotonic() - started)


def _plan(options: argparse.Namespace) -> Plan:
    """The plan before any cut.

    Raises:
        UserError: for options out of their range.
    """
    for name, value, least in (("--seeds", options.seeds, 2), ("--jobs", options.jobs, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; it must be {least} or more")
    if options.budget_minutes is not None and not options.budget_minutes > 0:
        raise UserError(f"--budget-minutes is {options.budget_minutes:g}; it must be above 0")
    rows = chosen(options.rows, ROWS, "--rows")
    if REFERENCE not in rows or len(rows) < 2:
        raise UserError(
            f"--rows is {' '.join(rows)}, but rows are compared with {REFERENCE}; name it and another one"
        )
    tasks = chosen(options.tasks or [next(iter(TASKS))], tuple(TASKS), "--tasks")
    return Plan(tasks, rows, tuple(range(1, options.seeds + 1)), SIZES[options.size])


def _announcement(plan: Plan, times: Times, jobs: int, done: frozenset[str]) -> list[str]:
    minutes = plan.minutes(times, jobs, done)
    total = plan.runs + plan.pilots + plan.warm_starts
    return [
        f"{plan.runs} runs ({len(plan.rows)} rows × {len(plan.seeds)} seeds × {len(plan.tasks)} tasks), "
        f"{plan.pilots} pilots and {plan.warm_starts} warm starts; {len(done)} of these {total} are complete",
        f"expected: {minutes:.0f} minutes, {jobs} runs at a time, from {times.step:.2f} s per step of OPO",
    ]


# ---------------------------------------------------------------------- what is complete, and times


def complete(folder: Path, plan: Plan) -> frozenset[str]:
    """Names of what need not be run again."""
    names = []
    for task in plan.tasks:
        seeds = {seed: seed_runs(folder, task, plan.size, seed) for seed in (PILOT_SEED, *plan.seeds)}
        names += [warm_name(task, seed) for seed, runs in seeds.items() if not runs.warm_commands()]
        pilots = pilot_runs(folder, task, plan.size)
        for row in plan.rows:
            names += [
                pilot_name(task, row, rate)
                for rate in RATES
                if (pilots.run(pilot_arm(row, rate)) / "summary.json").exists()
            ]
            names += [
                run_name(task, row, seed)
                for seed in plan.seeds
                if (seeds[seed].evaluation(arm_of(row)) / "eval.json").exists()
            ]
    return frozenset(names)


def measured_times(folder: Path, plan: Plan, jobs: int, display: Display) -> Times:
    """From the pilot's warm start and a few steps of OPO, `jobs` runs at a time; kept in DIR/times.json."""
    path, task = folder / "times.json", plan.tasks[0]
    if path.exists():
        return Times(**json.loads(path.read_text()))
    display.log("measuring the time of a step, before anything else")
    runs = pilot_runs(folder, task, plan.size)
    started = time.monotonic()
    if commands := runs.warm_commands():
        run_jobs([Job("warm start", commands, runs.log("warm"), 1.0)], 1, display, "warm starts")
    warm = time.monotonic() - started
    timed = [Arm(f"timed_{i}", REFERENCE, folder=arm_of(REFERENCE).folder) for i in range(jobs)]
    for arm in timed:
        shutil.rmtree(runs.run(arm), ignore_errors=True)
    started = time.monotonic()
    last = [f"train.steps={TIMED_STEPS}", "eval.every_steps=0"]
    run_jobs([_train(runs, arm, last) for arm in timed], jobs, display, "measurements")
    whole = time.monotonic() - started
    rows = [rows_of(runs, arm) for arm in timed]
    step = sum(row["time/step"] - row.get("time/eval", 0) for of_run in rows for row in of_run[2:])
    step /= jobs * (TIMED_STEPS - 1)
    evaluation = max(of_run[-1].get("time/eval", 0.0) for of_run in rows)
    every = 1 + max(1, plan.size.steps // 20)  # evaluations in training, and the one at its end
    times = Times(step, warm, whole - TIMED_STEPS * step, every * evaluation)
    path.write_text(json.dumps(vars(times)) + "\n")
    return times


def _train(runs: SeedRuns, arm: Arm, further: Sequence[str] = ()) -> Job:
    """`opo train` of a pilot or a measurement, which needs no `opo eval`."""
    command = [*OPO, "train", str(arm.path), *runs.overrides(arm), *further, "resume=auto"]
    return Job(arm.name, [command], runs.log(arm.name), arm.cost)


# ---------------------------------------------------------------------- running


def run_all(
    folder: Path, plan: Plan, times: Times, jobs: int, display: Display
) -> dict[str, dict[str, float]]:
    """Warm starts, pilots, then all runs, seed by seed; returns task → row → its learning rate."""
    done = complete(folder, plan)
    warm = [
        Job(warm_name(task, seed), commands, runs.log("warm"), times.warm_start)
        for task in plan.tasks
        for seed in (PILOT_SEED, *plan.seeds)
        if (commands := (runs := seed_runs(folder, task, plan.size, seed)).warm_commands())
    ]
    run_jobs(warm, jobs, display, "warm starts")
    pilots = [
        _train(pilot_runs(folder, task, plan.size), pilot_arm(row, rate))
        for task in plan.tasks
        for row in plan.rows
        for rate in RATES
        if pilot_name(task, row, rate) not in done
    ]
    run_jobs(pilots, jobs, display, "pilots")
    rates = {task: {row: best_rate(folder, plan, task, row) for row in plan.rows} for task in plan.tasks}
    waiting = []
    for seed in plan.seeds:
        for task in plan.tasks:
            runs = seed_runs(folder, task, plan.size, seed)
            for row in plan.rows:
                arm = arm_of(row, rates[task][row])
                runs.check_settings(arm)
                if commands := runs.arm_commands(arm):
                    name = run_name(task, row, seed)
                    waiting.append(
                        Job(name, commands, runs.log(row), arm.cost, _without_partial_evaluation(runs, arm))
                    )
    run_jobs(waiting, jobs, display, "runs")
    return rates


def _without_partial_evaluation(runs: SeedRuns, arm: Arm) -> Callable[[], None]:
    """`opo eval` rejects a non-empty folder; without eval.json it is from an interrupted evaluation."""
    return lambda: shutil.rmtree(runs.evaluation(arm), ignore_errors=True)


def pilot_accuracies(folder: Path, plan: Plan, task: str, row: str) -> dict[float, float]:
    """Learning rate → held-out accuracy at the end of its pilot."""
    runs = pilot_runs(folder, task, plan.size)
    return {
        rate: MetricsFile(runs.run(pilot_arm(row, rate)) / "metrics.jsonl").read()[-1]["eval/accuracy"]
        for rate in RATES
    }


def best_rate(folder: Path, plan: Plan, task: str, row: str) -> float:
    """Of the highest accuracy; of equal ones, the lowest rate."""
    found = pilot_accuracies(folder, plan, task, row)
    return max(sorted(found), key=lambda rate: found[rate])


# ---------------------------------------------------------------------- results


def write_results(
    folder: Path,
    plan: Plan,
    rates: dict[str, dict[str, float]],
    notes: Sequence[str],
    target: Path,
    seconds: float,
) -> None:
    """The record, its figures, and a line per comparison."""
    results: dict[str, Any] = {
        "rows": list(plan.rows),
        "seeds": list(plan.seeds),
        "cut": list(notes),
        "training samples of every run": same_samples(folder, plan),
        "rule": RULE,
        "seconds of this command": round(seconds),
        "tasks": {},
    }
    figures = []
    for task in plan.tasks:
        values = measures_of(_seeds(folder, plan, task), plan.rows)
        found = paired_results(values, REFERENCE)
        results["tasks"][task] = {
            "learning rates": rates[task],
            "pilot: held-out accuracy by rate": {
                row: {f"{rate:g}": value for rate, value in pilot_accuracies(folder, plan, task, row).items()}
                for row in plan.rows
            },
            "measures": values,
            f"differences to {REFERENCE}": found,
        }
        figures += plot_all(_seeds(folder, plan, task), plan.rows, task, target)
        print_results(task, found)
    path = write_record("arena", results, target)
    print(f"written to {path} and {', '.join(figure.name for figure in figures)} beside it")


def _seeds(folder: Path, plan: Plan, task: str) -> list[SeedRuns]:
    return [seed_runs(folder, task, plan.size, seed) for seed in plan.seeds]


def same_samples(folder: Path, plan: Plan) -> int:
    """The number of training samples of each run, all of which began with their seed's weights.

    Raises:
        UserError: where runs differ.
    """
    counts = {}
    for task in plan.tasks:
        for runs in _seeds(folder, plan, task):
            for row in plan.rows:
                check_initial_weights(runs, arm_of(row))
                counts[runs.run(arm_of(row))] = training_samples(runs, arm_of(row))
    first = next(iter(counts.values()))
    for run, count in counts.items():
        if count != first:
            raise UserError(f"{run} has {count} samples, others {first}; remove its folder and start again")
    return first


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
