"""The grading of math answers in worker processes, on all of MATH and GSM8K, right and wrong."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.verifier_sets import GSM8K_SIZE, MATH_SIZE, boxed, rows_of, solutions, wrong_answers

from opo_megatron.tasks.math_answers import grade, last_boxed, reference
from opo_megatron.tasks.worker_pool import WorkerPool
from tests.support.requirements import require


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool(2, 5.0, 2048)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def strict_workers() -> Iterator[WorkerPool]:
    """math-verify computes 100000000! to the last digit, which takes longer than the limit."""
    require("math_verify", "pip install -e '.[math]'")
    pool = WorkerPool(2, 1.5, 2048, grader="math_strict")
    yield pool
    pool.close()


def test_workers_grade_in_order_and_by_context(workers: WorkerPool) -> None:
    interval = "The solution is the interval (0,1)."
    jobs = [(boxed("x+1"), "1+x"), (boxed("2"), "3"), (boxed("0<x<1"), "(0,1)", interval), ("no box", "3")]
    assert workers.grade([*jobs, (boxed("0<x<1"), "(0,1)"), (boxed("5"), "5")]) == [1, 0, 1, 0, 0, 1]


def test_the_strict_verifier_is_math_verify_alone(strict_workers: WorkerPool) -> None:
    jobs = [("The answer is $\\frac{1}{2}$.", "0.5"), (boxed("0.3333333"), "1/3"), (boxed("3t"), "3")]
    assert strict_workers.grade([*jobs, (boxed("4"), "3")]) == [1, 1, 1, 0]
    assert grade(*jobs[1]) == grade(*jobs[2]) == 0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{\frac{2}{3}}", r"\frac{2}{3}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\fbox{x}", "x"),
        (r"\boxed 5$", "5"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        ("nothing", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


def test_gold_answers_of_three_data_sets_are_parsed() -> None:
    assert reference("6 of them.\n#### 1,234") == "1,234"
    assert reference(r"so $\boxed{\sqrt2}$.") == r"\sqrt2"
    assert reference(r" \frac{1}{2} ") == r"\frac{1}{2}"


def test_a_hang_or_failure_affects_one_sample_alone(strict_workers: WorkerPool) -> None:
    hanging = boxed("100000000!")
    hostile = [boxed("(" * 4000), boxed("9^{" * 300 + "9" + "}" * 300), "\ud800" * 9]
    jobs = [(boxed("x+1"), "1+x"), (hanging, "3"), *[(text, "7") for text in hostile], (boxed("7"), "7")]
    before = strict_workers.timeouts
    rewards = strict_workers.grade(jobs)
    assert rewards[0] == rewards[-1] == 1.0 and rewards[1] is None and strict_workers.timeouts > before
    assert all(not reward for reward in rewards[2:-1])
    # An interrupted worker grades nothing more: the next rewards are right.
    assert strict_workers.grade([(boxed("x+1"), "1+x")] * 4) == [1.0] * 4


def test_a_killed_worker_is_replaced(workers: WorkerPool) -> None:
    pool = WorkerPool(1, 20.0, 2048)
    assert pool.grade([(boxed("1"), "1")]) == [1.0]
    pool._workers[0].process.kill()
    pool._workers[0].process.wait()
    assert pool.grade([(boxed("2"), "2"), (boxed("3"), "4")]) == [1.0, 0.0]
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)


def data() -> Path:
    folder = os.environ.get("OPO_TEST_DATA")
    if folder is None:
        pytest.skip("set OPO_TEST_DATA to the folder with math/ and gsm8k/")
    return Path(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gold_answers_of_math_and_gsm8k_are_accepted(workers: WorkerPool) -> None:
    all_solutions = solutions(data())
    assert len(all_solutions) == MATH_SIZE + GSM8K_SIZE
    rewards = workers.grade([(text, reference(text)) for text, _ in all_solutions])
    wrong = [text for (text, _), reward in zip(all_solutions, rewards, strict=True) if reward != 1]
    assert len(wrong) <= 0.001 * len(all_solutions), wrong[:20]
    answers = json.loads((data() / "math500" / "math500.json").read_text())
    of_test = {row["problem"]: row["solution"] for row in rows_of(data(), "math/test.jsonl")}
    pairs = [(of_test[row["problem"]], row["answer"]) for row in answers if row["problem"] in of_test]
    assert len(pairs) == 500 and sum(reward or 0 for reward in workers.grade(pairs)) >= 0.995 * 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wrong_answers_to_math_and_gsm8k_are_rejected(workers: WorkerPool) -> None:
    pairs, _ = wrong_answers(solutions(data()), 6000)
    rewards = workers.grade([(boxed(one.answer), one.gold) for one in pairs])
    accepted = [one for one, reward in zip(pairs, rewards, strict=True) if reward]
    assert len(pairs) > 40_000 and len(accepted) <= 0.0001 * len(pairs), accepted[:20]
    for change in {one.change for one in pairs}:
        of_rule = [one for one in pairs if one.change == change]
        assert sum(one.change == change for one in accepted) <= 0.001 * len(of_rule)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_hostile_answers_crash_nothing(workers: WorkerPool) -> None:
    rng = random.Random(0)
    pieces = [
        "\\frac{", "\\sqrt{", "^{", "}", "(", ")", "\\left(", "9", "99999999999", "!", "\\boxed{",
        "\\begin{matrix}", "&", "\\\\", "x", "\\text{", "\x00", "\ud83d", "é", "\\int", "\\sum_{n=1}^{", "e^",
        "\\infty", ",", "=", "$",
    ]  # fmt: skip
    answers = ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(9_900)]
    answers += ["(" * rng.randint(1, 10**6) for _ in range(40)]
    answers += ["9^" * rng.randint(1, 2000) + "9" for _ in range(40)]
    answers += ["x" * 10**6] * 10 + [f"{rng.randint(10**3, 10**9)}!" for _ in range(10)]
    pool = WorkerPool(2, 1.0, 2048)
    rewards = pool.grade([(boxed(answer), "17") for answer in answers])
    assert len(rewards) == 10_000 and pool.grade([(boxed("17"), "17")]) == [1.0]
    assert rewards.count(None) == pool.timeouts + pool.crashes
    pool.close()
