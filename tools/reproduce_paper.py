"""Reproduces the comparison of the OPO paper (arXiv 2505.23585) at a scale that a laptop can run.

    python tools/reproduce_paper.py --scale small --seeds 5     # → records/paper_small.json and figures
    python tools/reproduce_paper.py --scale tiny                # a few minutes: tests that it works
    python tools/reproduce_paper.py --scale small --folder runs/mine --no-record --jobs 4

Each seed has one supervised warm start, and every arm of recipes/paper_small starts from its weights, which
is checked byte for byte.  All arms generate equally many samples at the same learning rate; off-policy GRPO,
which takes several updates per batch, also runs at two lower rates.  Its best rate is chosen by pass@1 on the
evaluation problems themselves, averaged over seeds: no other arm has this choice, so the comparison favours
it.

At the end `opo eval` samples several responses per held-out problem for every arm, and every claim of the
paper is reproduced, not reproduced, or not testable at this scale, by the rule in tools/paper/claims.py.  The
same command resumes after an interruption; finished runs are not run again.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.record import RECORDS, write_record
from paper.arms import (
    ARMS,
    LOWER_RATES,
    OFF_POLICY,
    ON_POLICY,
    SCALES,
    Arm,
    SeedRuns,
    check_initial_weights,
    read_measures,
    training_samples,
)
from paper.claims import BEST_RATE, Finding, claims, judge
from paper.figures import interval_text, load_pyplot, plot_claims, plot_curves, verdict_text

from opo_megatron.cli.main import Parser, print_error
from opo_megatron.errors import EXIT_USER_ERROR, UserError
from opo_megatron.observe.console import Display
from opo_megatron.report.runs import read_runs
from opo_megatron.utils.terminal import prepare_terminal

POLL_SECONDS = 0.2
LAST_LINES = 5

Measured = dict[str, dict[str, list[float | None]]]
"""Arm → measure → one value per seed."""


@dataclass
class Job:
    """Commands to run in order, and how many of them are done."""

    name: str
    commands: list[list[str]]
    log: Path
    cost: float
    before: Callable[[], None] = lambda: None
    done: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start_next(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(self.commands[self.done])}\n".encode())
            log.flush()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                self.commands[self.done], stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def advance(self) -> bool:
        """Start the next command when one has exited; True once all are done.

        Raises:
            UserError: where it failed.
        """
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        if code != 0:
            last_lines = self.log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
            raise UserError(
                f"{self.name} failed with exit code {code}; its log {self.log} ends with:\n"
                + "\n".join(last_lines)
            )
        self.done += 1
        if self.done < len(self.commands):
            self.start_next()
            return False
        return True


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
    add("--scale", choices=tuple(SCALES), default="small", help="size of the comparison (default: small)")
    add("--seeds", type=int, metavar="N", help="seeds 1 to N (default: 5 for small, 2 for tiny)")
    add("--jobs", type=int, default=2, metavar="N", help="concurrent runs, one thread each (default: 2)")
    add("--folder", type=Path, metavar="DIR", help="folder of all runs (default: runs/paper_SCALE)")
    add("--no-record", action="store_true", help="write results to DIR, not to records/, as tiny always does")
    return parser


def compare(options: argparse.Namespace) -> None:
    """Run what is missing, then measure, judge, and write and print the results."""
    scale = SCALES[options.scale]
    seeds = scale.seeds if options.seeds is None else options.seeds
    if seeds < 2:
        raise UserError(f"--seeds is {seeds}, but an interval over seeds needs two or more; set --seeds 5")
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; it must be 1 or more")
    load_pyplot()  # fails before hours of runs where matplotlib is missing
    folder = (options.folder or Path("runs") / f"paper_{options.scale}").resolve()
    all_seeds = [SeedRuns(folder, scale, seed) for seed in range(1, seeds + 1)]
    started = time.monotonic()
    run_all(all_seeds, options.jobs)
    measured = measure(all_seeds)
    best, rates = best_rate(measured)
    measured[BEST_RATE] = measured[best]
    findings = [judge(claim, measured) for claim in claims(scale.samples)]
    target = folder if options.no_record or options.scale != "small" else RECORDS
    name = f"paper_{options.scale}"
    results = {
        "seeds": [seed.number for seed in all_seeds],
        "training samples of every run": same_samples(all_seeds),
        "best learning rate of off-policy GRPO": {"arm": best, "pass@1 by rate, which chose it": rates},
        "seconds of this command": round(time.monotonic() - started),
        "arms": {arm.name: _rounded(measured[arm.name]) for arm in ARMS},
        "rule": "paired over seeds, 95 % t intervals, not corrected for their number; tools/paper/claims.py",
        "claims": [_row(finding) for finding in findings],
    }
    figures = plot_all(all_seeds, best, findings, target, name)
    path = write_record(name, results, target)
    print_findings(findings)
    print(f"written to {path} and {', '.join(figure.name for figure in figures)} beside it")


# ---------------------------------------------------------------------- running


def run_all(all_seeds: Sequence[SeedRuns], concurrency: int) -> None:
    """Run warm starts, then all arms; only check the settings of complete ones."""
    display = Display(active=True)
    try:
        warm = [
            Job(f"seed {seed.number} warm start", commands, seed.log("warm"), cost=0.8)
            for seed in all_seeds
            if (commands := seed.warm_commands())
        ]
        run_jobs(warm, concurrency, display, "warm starts")
        jobs: list[Job] = []
        for seed in all_seeds:
            for arm in ARMS:
                seed.check_settings(arm)
                if commands := seed.arm_commands(arm):
                    before = _remove_partial_evaluation(seed, arm)
                    jobs.append(
                        Job(f"seed {seed.number} {arm.name}", commands, seed.log(arm.name), arm.cost, before)
                    )
        complete = len(all_seeds) * len(ARMS) - len(jobs)
        if complete:
            display.log(f"{complete} of {complete + len(jobs)} runs are complete in {all_seeds[0].folder}")
        run_jobs(jobs, concurrency, display, "runs")
    finally:
        display.close()


def _remove_partial_evaluation(seed: SeedRuns, arm: Arm) -> Callable[[], None]:
    """`opo eval` rejects a non-empty folder; without eval.json it is from an interrupted evaluation."""
    return lambda: shutil.rmtree(seed.evaluation(arm), ignore_errors=True)


def run_jobs(jobs: Sequence[Job], concurrency: int, display: Display, what: str) -> None:
    """Run all jobs, `concurrency` at a time; when one fails, the others are terminated.

    Raises:
        UserError: for the first that fails.
    """
    waiting, running, started = list(jobs), list[Job](), time.monotonic()
    finished, total = 0.0, sum(job.cost for job in jobs)
    try:
        while waiting or running:
            while waiting and len(running) < concurrency:
                job = waiting.pop(0)
                job.before()
                job.start_next()
                running.append(job)
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.advance()]:
                running.remove(job)
                finished += job.cost
                left = (time.monotonic() - started) * (total - finished) / finished
                count = f"{len(jobs) - len(waiting) - len(running)}/{len(jobs)} {what}"
                display.log(f"{count}  {job.name} is done; about {_minutes(left)} left")
            display.status(f"{what}: {', '.join(job.name for job in running)}", finished / total)
    finally:
        for job in running:
            assert job.process is not None
            job.process.terminate()  # a run saves, and resumes next time
        for job in running:
            assert job.process is not None
            job.process.wait()


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


# ---------------------------------------------------------------------- measuring


def measure(all_seeds: Sequence[SeedRuns]) -> Measured:
    """Arm → measure → a value per seed, of runs that all started with their seed's weights."""
    measured: Measured = {}
    for arm in ARMS:
        for seed in all_seeds:
            check_initial_weights(seed, arm)
            for name, value in read_measures(seed, arm).items():
                measured.setdefault(arm.name, {}).setdefault(name, []).append(value)
    return measured


def best_rate(measured: Measured) -> tuple[str, dict[str, float]]:
    """The arm of off-policy GRPO with the highest mean pass@1 over seeds, and pass@1 of all its arms."""
    means = {
        name: fmean(value for value in measured[name]["pass@1"] if value is not None)
        for name in (OFF_POLICY, *LOWER_RATES)
    }
    return max(means, key=lambda name: means[name]), {name: round(value, 4) for name, value in means.items()}


def same_samples(all_seeds: Sequence[SeedRuns]) -> int:
    """The number of training samples of each run.

    Raises:
        UserError: where runs differ.
    """
    counts = {str(seed.run(arm)): training_samples(seed, arm) for seed in all_seeds for arm in ARMS}
    first = next(iter(counts.values()))
    for run, count in counts.items():
        if count != first:
            raise UserError(f"{run} has {count} samples, others {first}; remove its folder and start again")
    return first


# ---------------------------------------------------------------------- figures and output


def plot_all(
    all_seeds: Sequence[SeedRuns], best: str, findings: Sequence[Finding], target: Path, name: str
) -> list[Path]:
    """Curves of the arms that the paper compares, curves of all baselines, and the table of claims."""
    target.mkdir(parents=True, exist_ok=True)
    runs = read_runs([seed.run(arm) for arm in ARMS for seed in all_seeds])
    runs_of_arm = {
        arm.name: runs[i * len(all_seeds) : (i + 1) * len(all_seeds)] for i, arm in enumerate(ARMS)
    }
    seeds = f"mean over {len(all_seeds)} seeds, band from minimum to maximum"
    paper_arms = list(dict.fromkeys(("opo", "grpo_on_policy", OFF_POLICY, best)))
    return [
        plot_curves(
            {arm: runs_of_arm[arm] for arm in paper_arms}, f"exact on-policy and off-policy: {seeds}",
            target / f"{name}_curves.png",
        ),
        plot_curves(
            {arm: runs_of_arm[arm] for arm in ON_POLICY}, f"baselines, all exactly on-policy: {seeds}",
            target / f"{name}_baselines.png",
        ),
        plot_claims(
            findings, f"paired differences over {len(all_seeds)} seeds, scale {name.removeprefix('paper_')}",
            target / f"{name}_claims.png",
        ),
    ]  # fmt: skip


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one line per claim."""
    width = max(len(finding.claim.text) for finding in findings)
    for one in findings:
        print(f"{one.claim.text:<{width}}  {interval_text(one.difference):<30}  {verdict_text(one)}")


def _row(finding: Finding) -> dict[str, Any]:
    claim, difference = finding.claim, finding.difference
    row: dict[str, Any] = {"claim": claim.text}
    if claim.is_testable:
        row |= {"measure": claim.measure, "arm": claim.arm, "other": claim.other}
        if claim.other_measure is not None:
            row["measure of other"] = claim.other_measure
    if difference is not None:
        row |= {"difference": [round(value, 5) for value in difference]}
    return row | {"verdict": verdict_text(finding)}


def _rounded(measures: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {
        name: [None if value is None else round(value, 5) for value in values]
        for name, values in measures.items()
    }


if __name__ == "__main__":
    prepare_terminal()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # terminates the runs too
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that progress shows in a file too
    sys.exit(main())
