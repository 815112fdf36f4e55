"""Reproduces the comparison of the OPO paper (arXiv 2505.23585) at a scale that a laptop can run.

    python tools/reproduce_paper.py --scale small --seeds 5     # → records/paper_small.json and pictures
    python tools/reproduce_paper.py --scale tiny                # a few minutes: shows that it works
    python tools/reproduce_paper.py --scale small --folder runs/mine --no-record --jobs 4

Per seed one supervised warm start is made, and every arm of recipes/paper_small begins with its weights,
byte for byte the same, which is checked.  All arms draw equally many samples and have one learning rate;
off-policy GRPO, which takes several updates per batch, also runs at two lower ones.  Its best one is that
with the highest pass@1 on the very problems that arms are compared by, as a mean over seeds: a choice
that no other arm has, so the comparison favours it.

At the end every arm answers held-out problems several times (`opo eval`), and every claim of the paper is
reproduced, not reproduced, or not testable at this scale, by the rule in tools/paper/claims.py.  Calling
the same command again goes on where it was interrupted; what is finished is not run again.
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
    OFF_POLICY,
    ON_POLICY,
    SCALES,
    SLOWER,
    Arm,
    Place,
    check_same_start,
    read_measures,
    samples_drawn,
)
from paper.claims import BEST_RATE, Finding, claims, judge
from paper.figures import draw_claims, draw_curves, interval_text, load_pyplot, shown

from opo_megatron.cli.main import Parser, print_error
from opo_megatron.errors import EXIT_USER_ERROR, UserError
from opo_megatron.observe.console import Display
from opo_megatron.report.runs import read_runs

POLL_SECONDS = 0.2
LAST_LINES = 5

Measured = dict[str, dict[str, list[float | None]]]
"""Arm → measure → one value per seed."""


@dataclass
class Job:
    """Commands that are run one after the other, and how many of them are done."""

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

    def is_over(self) -> bool:
        """Go on with the next command when one has ended.

        Raises:
            UserError: where it failed.
        """
        assert self.process is not None
        code = self.process.poll()
        if code is None:
            return False
        if code != 0:
            said = self.log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
            raise UserError(
                f"{self.name} ended with exit code {code}; {self.log} has all it said, which ends with:\n"
                + "\n".join(said)
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
    add("--scale", choices=tuple(SCALES), default="small", help="how much of everything (default: small)")
    add("--seeds", type=int, metavar="N", help="seeds 1 to N (default: 5 of small, 2 of tiny)")
    add("--jobs", type=int, default=2, metavar="N", help="runs at a time, of one thread each (default: 2)")
    add("--folder", type=Path, metavar="DIR", help="of all runs (default: runs/paper_SCALE)")
    add("--no-record", action="store_true", help="results go to DIR, not to records/; so do those of tiny")
    return parser


def compare(options: argparse.Namespace) -> None:
    """Run what is missing, then measure, judge, write and say it."""
    scale = SCALES[options.scale]
    seeds = scale.seeds if options.seeds is None else options.seeds
    if seeds < 2:
        raise UserError(f"--seeds is {seeds}, but differences over seeds need two or more; say --seeds 5")
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; it must be 1 or more")
    load_pyplot()  # or say before hours of runs that it is missing
    folder = (options.folder or Path("runs") / f"paper_{options.scale}").resolve()
    places = [Place(folder, scale, seed) for seed in range(1, seeds + 1)]
    started = time.monotonic()
    run_all(places, options.jobs)
    measured = measure(places)
    best, rates = best_rate(measured)
    measured[BEST_RATE] = measured[best]
    findings = [judge(claim, measured) for claim in claims(scale.samples)]
    target = folder if options.no_record or options.scale != "small" else RECORDS
    name = f"paper_{options.scale}"
    results = {
        "seeds": [place.seed for place in places],
        "training samples of every run": same_samples(places),
        "best learning rate of off-policy GRPO": {"arm": best, "pass@1 by rate, which chose it": rates},
        "seconds of this command": round(time.monotonic() - started),
        "arms": {arm.name: _rounded(measured[arm.name]) for arm in ARMS},
        "rule": "paired over seeds, 95 % t intervals, not corrected for their number; tools/paper/claims.py",
        "claims": [_row(finding) for finding in findings],
    }
    pictures = draw(places, best, findings, target, name)
    path = write_record(name, results, target)
    log(findings)
    print(f"written to {path} and {', '.join(picture.name for picture in pictures)} beside it")


# ---------------------------------------------------------------------- running


def run_all(places: Sequence[Place], at_once: int) -> None:
    """Warm starts, then all arms; what is complete is only checked."""
    display = Display(active=True)
    try:
        warm = [
            Job(f"seed {place.seed} warm start", commands, place.log("warm"), cost=0.8)
            for place in places
            if (commands := place.warm_commands())
        ]
        run_jobs(warm, at_once, display, "warm starts")
        jobs: list[Job] = []
        for place in places:
            for arm in ARMS:
                place.check_settings(arm)
                if commands := place.arm_commands(arm):
                    before = _removes_half_of_an_evaluation(place, arm)
                    jobs.append(
                        Job(f"seed {place.seed} {arm.name}", commands, place.log(arm.name), arm.cost, before)
                    )
        there = len(places) * len(ARMS) - len(jobs)
        if there:
            display.log(f"{there} of {there + len(jobs)} runs are complete in {places[0].folder}")
        run_jobs(jobs, at_once, display, "runs")
    finally:
        display.close()


def _removes_half_of_an_evaluation(place: Place, arm: Arm) -> Callable[[], None]:
    """`opo eval` refuses a folder that holds something, and only a finished one holds eval.json."""
    return lambda: shutil.rmtree(place.evaluation(arm), ignore_errors=True)


def run_jobs(jobs: Sequence[Job], at_once: int, display: Display, what: str) -> None:
    """All of them, `at_once` at a time; when one fails, the others are ended.

    Raises:
        UserError: for the first that failed.
    """
    waiting, running, began = list(jobs), list[Job](), time.monotonic()
    finished, total = 0.0, sum(job.cost for job in jobs)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                job.before()
                job.start_next()
                running.append(job)
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.is_over()]:
                running.remove(job)
                finished += job.cost
                left = (time.monotonic() - began) * (total - finished) / finished
                count = f"{len(jobs) - len(waiting) - len(running)}/{len(jobs)} {what}"
                display.log(f"{count}  {job.name} is done; about {_minutes(left)} left")
            display.status(f"{what}: {', '.join(job.name for job in running)}", finished / total)
    finally:
        for job in running:
            assert job.process is not None
            job.process.terminate()  # a run saves and goes on from there next time
        for job in running:
            assert job.process is not None
            job.process.wait()


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


# ---------------------------------------------------------------------- measuring


def measure(places: Sequence[Place]) -> Measured:
    """Arm → measure → a value per seed, of runs that all began with their seed's weights."""
    measured: Measured = {}
    for arm in ARMS:
        for place in places:
            check_same_start(place, arm)
            for name, value in read_measures(place, arm).items():
                measured.setdefault(arm.name, {}).setdefault(name, []).append(value)
    return measured


def best_rate(measured: Measured) -> tuple[str, dict[str, float]]:
    """Off-policy GRPO's arm with the highest mean pass@1 over seeds, and that of each of its arms."""
    found = {
        name: fmean(value for value in measured[name]["pass@1"] if value is not None)
        for name in (OFF_POLICY, *SLOWER)
    }
    return max(found, key=lambda name: found[name]), {name: round(value, 4) for name, value in found.items()}


def same_samples(places: Sequence[Place]) -> int:
    """How many training samples each run drew.

    Raises:
        UserError: where one drew more or fewer than the others.
    """
    drawn = {str(place.run(arm)): samples_drawn(place, arm) for place in places for arm in ARMS}
    first = next(iter(drawn.values()))
    for run, count in drawn.items():
        if count != first:
            raise UserError(f"{run} drew {count} samples, others {first}; remove its folder and start again")
    return first


# ---------------------------------------------------------------------- telling


def draw(
    places: Sequence[Place], best: str, findings: Sequence[Finding], target: Path, name: str
) -> list[Path]:
    """Curves of the arms that the paper compares, curves of all baselines, and the table of claims."""
    target.mkdir(parents=True, exist_ok=True)
    everyone = read_runs([place.run(arm) for arm in ARMS for place in places])
    of_arm = {arm.name: everyone[i * len(places) : (i + 1) * len(places)] for i, arm in enumerate(ARMS)}
    seeds = f"mean over {len(places)} seeds, band from the least to the greatest"
    papers = list(dict.fromkeys(("opo", "grpo_on_policy", OFF_POLICY, best)))
    return [
        draw_curves(
            {arm: of_arm[arm] for arm in papers}, f"exact on-policy and off-policy: {seeds}",
            target / f"{name}_curves.png",
        ),
        draw_curves(
            {arm: of_arm[arm] for arm in ON_POLICY}, f"baselines, all exactly on-policy: {seeds}",
            target / f"{name}_baselines.png",
        ),
        draw_claims(
            findings, f"paired differences over {len(places)} seeds, scale {name.removeprefix('paper_')}",
            target / f"{name}_claims.png",
        ),
    ]  # fmt: skip


def log(findings: Sequence[Finding]) -> None:
    """Every claim on a line of its own."""
    width = max(len(finding.claim.says) for finding in findings)
    for one in findings:
        print(f"{one.claim.says:<{width}}  {interval_text(one.difference):<30}  {shown(one)}")


def _row(finding: Finding) -> dict[str, Any]:
    claim, difference = finding.claim, finding.difference
    row: dict[str, Any] = {"claim": claim.says}
    if claim.is_testable:
        row |= {"measure": claim.measure, "arm": claim.arm, "other": claim.other}
        if claim.other_measure is not None:
            row["measure of other"] = claim.other_measure
    if difference is not None:
        row |= {"difference": [round(value, 5) for value in difference]}
    return row | {"verdict": shown(finding)}


def _rounded(measures: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {
        name: [None if value is None else round(value, 5) for value in values]
        for name, values in measures.items()
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that runs are ended too
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # progress is seen in a file too
    sys.exit(main())
