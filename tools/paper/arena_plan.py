"""Rows, tasks and sizes of the arena, and what of them fits into a budget.

    DIR/TASK/pilot/seed_1000/…      warm start and pilot runs, whose seed does not count
    DIR/TASK/seed_1/ROW/            a run at the row's learning rate, as tools/paper/arms.py lays it out

A run takes start-up + steps × seconds per step × the row's cost + its evaluations.  Seconds per step are
measured on this machine, with as many runs at a time as the arena will have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paper.arms import ROOT, Arm, Scale, SeedRuns

from opo_megatron.errors import UserError

RECIPES = ROOT / "recipes" / "arena"
REFERENCE = "opo"
COSTS = {
    "opo": 1.0, "james_stein": 1.0, "rloo": 1.0, "grpo": 1.0,
    "grpo_off_policy": 1.8, "dppo_tv": 1.8, "cispo": 1.8, "bapo": 2.2,
    "grpo_off_policy_stale_4": 1.9, "dppo_tv_stale_4": 1.9, "cispo_stale_4": 1.9, "bapo_stale_4": 2.3,
}  # fmt: skip
"""Rows, in the order of their importance: a small budget cuts from the end.  With the time of a run relative
to OPO's, four updates per batch and a pass for old log-probabilities included."""
ROWS = tuple(COSTS)
RATES = (1e-4, 2e-4, 4e-4)
"""Learning rates of a pilot."""
PILOT_SEED = 1000
TASKS: dict[str, tuple[str, ...]] = {
    "hard_lift": (),
    "long_lift": (
        "task.options.floors=20", "task.options.moves=7", "rollout.max_response_tokens=56",
    ),
}  # fmt: skip
"""Overrides of every recipe, by task."""
FEWEST_SEEDS = 2
"""An interval over seeds needs two."""


@dataclass(frozen=True)
class Size:
    """How long a run and a pilot are."""

    overrides: tuple[str, ...] = ()
    steps: int = 120
    pilot_steps: int = 40
    samples: int = 16
    """Responses per held-out problem at the end."""
    problems: int = 256


SIZES = {
    "full": Size(),
    "tiny": Size(
        (
            "warm_start.steps=30", "warm_start.warmup_steps=5", "rollout.prompts_per_step=8",
            "rollout.samples_per_prompt=4", "eval.problems=16", "eval.samples_per_problem=2",
            "eval.every_steps=2", "algorithm.variance_every=2",
        ),
        steps=6, pilot_steps=2, samples=4, problems=32,
    ),
}  # fmt: skip
"""`tiny` only tests that everything works; its numbers mean nothing."""


@dataclass(frozen=True)
class Times:
    """Seconds, measured."""

    step: float
    warm_start: float
    start: float
    """Of a run's start-up and its first evaluation."""
    evaluation: float = 0.0
    """Of a run's last one."""


@dataclass(frozen=True)
class Plan:
    """What will be run."""

    tasks: tuple[str, ...]
    rows: tuple[str, ...]
    seeds: tuple[int, ...]
    size: Size

    @property
    def pilots(self) -> int:
        return len(self.tasks) * len(self.rows) * len(RATES)

    @property
    def runs(self) -> int:
        return len(self.tasks) * len(self.rows) * len(self.seeds)

    @property
    def warm_starts(self) -> int:
        return len(self.tasks) * (1 + len(self.seeds))

    def minutes(self, times: Times, jobs: int, done: frozenset[str] = frozenset()) -> float:
        """Expected, `jobs` runs at a time.

        Args:
            done: names of the runs, pilots and warm starts that are complete.
        """
        seconds = 0.0
        for task in self.tasks:
            for seed in (PILOT_SEED, *self.seeds):
                seconds += times.warm_start * (warm_name(task, seed) not in done)
            for row in self.rows:
                pilot = times.start + self.size.pilot_steps * times.step * COSTS[row]
                whole = times.start + self.size.steps * times.step * COSTS[row] + times.evaluation
                seconds += pilot * sum(pilot_name(task, row, rate) not in done for rate in RATES)
                seconds += whole * sum(run_name(task, row, seed) not in done for seed in self.seeds)
        return seconds / 60 / jobs


def warm_name(task: str, seed: int) -> str:
    return f"{task} seed {seed} warm start"


def pilot_name(task: str, row: str, rate: float) -> str:
    return f"{task} pilot {row} lr {rate:g}"


def run_name(task: str, row: str, seed: int) -> str:
    return f"{task} seed {seed} {row}"


def cut(
    plan: Plan, times: Times, jobs: int, budget: float | None, done: frozenset[str] = frozenset()
) -> tuple[Plan, list[str]]:
    """The part of a plan that fits into `budget` minutes, and what was cut, in sentences.

    Seeds go first, the last one first, down to two; then rows from the end, down to two.

    Raises:
        UserError: where that does not fit either.
    """
    smaller = plan
    while budget is not None and smaller.minutes(times, jobs, done) > budget:
        if len(smaller.seeds) > FEWEST_SEEDS:
            smaller = replace(smaller, seeds=smaller.seeds[:-1])
        elif len(smaller.rows) > 2:
            smaller = replace(smaller, rows=smaller.rows[:-1])
        else:
            raise UserError(
                f"--budget-minutes is {budget:g}, but two rows with {len(smaller.seeds)} seeds take about "
                f"{smaller.minutes(times, jobs, done):.0f} minutes; raise it, or name fewer --tasks"
            )
    notes = []
    if cut_seeds := plan.seeds[len(smaller.seeds) :]:
        notes.append(f"cut for the budget: seeds {', '.join(map(str, cut_seeds))}")
    if cut_rows := plan.rows[len(smaller.rows) :]:
        notes.append(f"cut for the budget: rows {', '.join(cut_rows)}")
    return smaller, notes


def arm_of(row: str, rate: float | None = None) -> Arm:
    return Arm(row, row, rate, COSTS[row], RECIPES)


def seed_runs(folder: Path, task: str, size: Size, seed: int) -> SeedRuns:
    """The runs of a task's seed at full length; the pilot's seed has a folder of its own."""
    overrides = (*TASKS[task], f"train.steps={size.steps}", *size.overrides)
    where = folder / task / "pilot" if seed == PILOT_SEED else folder / task
    return SeedRuns(where, Scale(overrides, 0, size.samples, size.problems), seed, RECIPES / "opo.yaml")


def pilot_runs(folder: Path, task: str, size: Size) -> SeedRuns:
    """The pilot's runs, which are shorter; stale rows need more steps than their rollouts are old."""
    runs = seed_runs(folder, task, size, PILOT_SEED)
    steps = max(size.pilot_steps, 5)
    return replace(runs, scale=replace(runs.scale, overrides=(*runs.scale.overrides, f"train.steps={steps}")))


def pilot_arm(row: str, rate: float) -> Arm:
    return replace(arm_of(row, rate), name=f"{row}_lr_{rate:g}")


def chosen(names: Sequence[str] | None, known: Sequence[str], option: str) -> tuple[str, ...]:
    """The names that an option lists, in the order of `known`; default all.

    Raises:
        UserError: for one that does not exist.
    """
    if names is None:
        return tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"{option} names {name!r}, which is none of {', '.join(known)}; correct it")
    return tuple(name for name in known if name in names)
