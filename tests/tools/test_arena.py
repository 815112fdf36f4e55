"""The arena's plan and budget, its recipes and intervals; a tiny one runs to its record and resumes."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import arena
import pytest
import yaml
from paper.arena_plan import (
    COSTS,
    PILOT_SEED,
    RATES,
    ROWS,
    SIZES,
    TASKS,
    Plan,
    Times,
    arm_of,
    cut,
    pilot_arm,
    pilot_name,
    pilot_runs,
    run_name,
    seed_runs,
    warm_name,
)

from opo_megatron.config import load_config
from opo_megatron.errors import UserError
from opo_megatron.report.arms import Arm
from opo_megatron.report.paired import compared, paired, paired_table, t_quantile
from opo_megatron.report.runs import Run
from tests.support.paths import ROOT
from tests.support.requirements import require

TIMES = Times(step=1.0, warm_start=60.0, start=20.0, evaluation=40.0)
FULL = Plan(("hard_lift",), ROWS, (1, 2, 3), SIZES["full"])


# ---------------------------------------------------------------------- the plan


def test_expected_minutes_are_the_sum_of_all_runs() -> None:
    seconds = 4 * 60.0
    for row in ROWS:
        seconds += 3 * (20 + 40 * COSTS[row]) + 3 * (20 + 120 * COSTS[row] + 40)
    assert FULL.minutes(TIMES, jobs=2) == pytest.approx(seconds / 60 / 2)
    assert (FULL.runs, FULL.pilots, FULL.warm_starts) == (36, 36, 4)


@pytest.mark.parametrize(
    ("share", "seeds", "rows"),
    [(1.0, 3, 12), (0.99, 2, 12), (0.75, 2, 12), (0.6, 2, 9), (0.4, 2, 6), (0.2, 2, 3)],
)
def test_a_budget_cuts_seeds_first_then_rows_from_the_end(share: float, seeds: int, rows: int) -> None:
    budget = share * FULL.minutes(TIMES, 2) + 1e-9
    smaller, notes = cut(FULL, TIMES, 2, budget)
    assert smaller.seeds == FULL.seeds[:seeds] and smaller.rows == ROWS[: len(smaller.rows)]
    assert abs(len(smaller.rows) - rows) <= 1
    assert smaller.minutes(TIMES, 2) <= budget
    assert len(notes) == (seeds < 3) + (len(smaller.rows) < 12)
    if seeds < 3:
        assert notes[0] == "cut for the budget: seeds 3"
    if len(smaller.rows) < 12:
        assert notes[-1] == f"cut for the budget: rows {', '.join(ROWS[len(smaller.rows) :])}"
        more = Plan(FULL.tasks, ROWS[: len(smaller.rows) + 1], smaller.seeds, FULL.size)
        assert more.minutes(TIMES, 2) > budget, "no more is cut than must be"


def test_without_a_budget_nothing_is_cut() -> None:
    assert cut(FULL, TIMES, 2, None) == (FULL, [])


def test_what_is_complete_costs_nothing() -> None:
    done = {warm_name("hard_lift", seed) for seed in (PILOT_SEED, 1, 2, 3)}
    done |= {pilot_name("hard_lift", row, rate) for row in ROWS for rate in RATES}
    done |= {run_name("hard_lift", row, seed) for row in ROWS for seed in (1, 2)}
    third = sum(20 + 120 * COSTS[row] + 40 for row in ROWS) / 60 / 2
    assert FULL.minutes(TIMES, 2, frozenset(done)) == pytest.approx(third)
    assert cut(FULL, TIMES, 2, third + 1e-9, frozenset(done)) == (FULL, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds is 1; it must be 2 or more"),
        (["--jobs", "0"], "--jobs is 0; it must be 1 or more"),
        (["--budget-minutes", "0"], "--budget-minutes is 0; it must be above 0"),
        (["--budget-minutes", "nan"], "--budget-minutes is nan; it must be above 0"),
        (["--rows", "opo", "ppo"], "--rows names 'ppo', which is none of opo, james_stein"),
        (["--rows", "rloo", "grpo"], "--rows is rloo grpo, but rows are compared with opo; name it"),
        (["--rows", "opo"], "--rows is opo, but rows are compared with opo; name it and another one"),
        (["--tasks", "math"], "--tasks names 'math', which is none of hard_lift, long_lift"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arena.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_budget_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"^--budget-minutes is 1, but two rows with 2 seeds take about"):
        cut(FULL, TIMES, 2, 1.0)


# ---------------------------------------------------------------------- the recipes


def own_keys(row: str) -> dict[str, object]:
    """What a row's recipe and those that it is based on set, but for its folder."""
    recipe = yaml.safe_load((ROOT / "recipes" / "arena" / f"{row}.yaml").read_text())
    base = recipe.pop("base")
    recipe.pop("run")
    keys = {f"{section}.{key}": value for section, part in recipe.items() for key, value in part.items()}
    return (own_keys(Path(base).stem) if not base.startswith("..") else {}) | keys


def test_every_row_has_a_recipe_and_a_stale_one_differs_in_its_age_alone() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes" / "arena").glob("*.yaml")) == sorted(ROWS)
    for row in ROWS:
        if row.endswith("_stale_4"):
            stale = {"rollout.staleness": 4, "algorithm.off_policy_sampling": True}
            assert own_keys(row) == own_keys(row.removesuffix("_stale_4")) | stale
        elif row in ("grpo_off_policy", "dppo_tv", "cispo", "bapo"):
            assert own_keys(row)["algorithm.updates_per_batch"] == 4
            assert own_keys(row)["algorithm.baseline"] == "grpo"
        else:
            assert set(own_keys(row)) - set(own_keys("opo")) <= {"algorithm.baseline"}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_pilots_and_runs_load(task: str, tmp_path: Path) -> None:
    for runs, arm in (
        (seed_runs(tmp_path, task, SIZES["full"], 2), arm_of("opo", 1e-4)),
        (pilot_runs(tmp_path, task, SIZES["full"]), pilot_arm("grpo_off_policy_stale_4", 4e-4)),
    ):
        overrides = [one for one in runs.overrides(arm) if not one.startswith("policy.init_from")]
        config = load_config(arm.path, overrides)
        assert config.rollout.samples_per_prompt == 8 and config.optimizer.lr == arm.lr
        assert config.train.steps == (40 if arm.name.startswith("grpo") else 120)
        assert config.run.seed == (PILOT_SEED if arm.name.startswith("grpo") else 2)


# ---------------------------------------------------------------------- intervals


@pytest.mark.parametrize("count", [2, 3, 5, 10, 31])
@pytest.mark.parametrize("comparisons", [1, 11])
def test_intervals_are_students_and_bonferronis(count: int, comparisons: int) -> None:
    special = require("scipy.special", "pip install scipy")
    rng = random.Random(count)
    values = [rng.gauss(0.3, 2.0) for _ in range(count)]
    found = paired(values, comparisons)
    error = statistics.stdev(values) / math.sqrt(count)
    assert found.mean == pytest.approx(statistics.fmean(values)) and found.seeds == count
    for tail, half in ((0.025, found.half_width), (0.025 / comparisons, found.corrected)):
        assert 1 - special.stdtr(count - 1, half / error) == pytest.approx(tail), "the share above it"


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.999, 1 - 0.025 / 11])
def test_the_quantiles_are_those_of_the_closed_forms(probability: float) -> None:
    """Of 1 degree of freedom tan(π(p − 1/2)), of 2 (2p − 1)/√(2p(1 − p))."""
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)))
    two = (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    assert t_quantile(probability, 2) == pytest.approx(two)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"a": {1: 1.0, 2: 3.0}, "b": {1: 2.0, 2: 6.0}}, {"b": (2.0, 2)}),
        ({"a": {1: 1.0, 2: 3.0, 3: 9.0}, "b": {2: 4.0, 3: 12.0}}, {"b": (2.0, 2)}),
        ({"a": {1: 1.0, 2: 3.0}, "b": {2: 4.0}}, {}),
        ({"a": {1: 1.0, 2: 3.0}, "b": {1: 1.0, 2: 3.0}, "c": {5: 1.0}}, {"b": (0.0, 2)}),
        ({"b": {1: 1.0, 2: 3.0}}, {}),
    ],
)
def test_differences_are_of_the_seeds_that_both_have(
    values: dict[str, dict[int, float]], expected: dict[str, tuple[float, int]]
) -> None:
    found = compared(values, "a")
    assert {name: (one.mean, one.seeds) for name, one in found.items()} == expected


def test_the_report_has_a_table_of_paired_differences() -> None:
    def run(name: str, seed: int, accuracy: float) -> Run:
        row = {"step": 4, "eval/accuracy": accuracy}
        return Run(Path(name), name, {"run.seed": seed}, [row], {})

    base = Arm("opo", [run("a", 1, 0.5), run("b", 2, 0.6)])
    other = Arm("<rloo>", [run("c", 1, 0.4), run("d", 2, 0.4999)])
    table = paired_table([base, other])
    assert "&lt;rloo&gt;" in table and "-0.1" in table and "<b>-0.1" in table, "it differs"
    assert paired_table([base, Arm("x", [run("e", 7, 0.4)])]) == ""


# ---------------------------------------------------------------------- a tiny arena


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_tiny_arena_writes_its_record_and_resumes(tmp_path: Path) -> None:
    require("matplotlib", "pip install -e '.[report]'")
    argv = [sys.executable, str(ROOT / "tools" / "arena.py"), "--size", "tiny", "--seeds", "2"]
    argv += ["--rows", "opo", "grpo_off_policy_stale_4", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call() -> str:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = call()
    assert (
        "4 runs (2 rows × 2 seeds × 1 tasks), 6 pilots and 3 warm starts" in first and "expected: " in first
    )
    record = json.loads((tmp_path / "arena.json").read_text())["results"]
    assert record["training samples of every run"] == 6 * 8 * 4
    measures = record["tasks"]["hard_lift"]["measures"]
    assert measures["sampler_kl"]["grpo_off_policy_stale_4"]["1"] > measures["sampler_kl"]["opo"]["1"]
    assert set(record["tasks"]["hard_lift"]["differences to opo"]["pass@1"]) == {"grpo_off_policy_stale_4"}
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "arena_hard_lift_curves_1.png", "arena_hard_lift_differences.png",
    ]  # fmt: skip
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert "13 of these 13 are complete" in call()
    assert runs == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
