r"""Benchmarks the verifier `math` on all of MATH (12,500) and GSM8K (8,792) → records/verifier.json

python tools/bench_verifier.py --data DIR         # DIR/math and DIR/gsm8k
python tools/bench_verifier.py --limit 500        # 500 problems of $OPO_TEST_DATA; prints only

Correct: every gold answer in a box, and every reference solution of MATH, which has its own box.  Wrong: the
answer to another problem of the same type, a number plus or minus 1, the opposite sign, swapped coordinates
(one that happens to equal the gold answer still counts as wrongly accepted).  Speed: all of these per second,
after 100 warm-up answers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import write_record
from bench.verifier_sets import Solution, boxed, solutions, wrong_answers

from opo_megatron.tasks.math_answers import reference
from opo_megatron.tasks.worker_pool import WorkerPool

WRONG_OF = 6000
"""Problems for which wrong answers are generated."""
WARM_UP = 100
SHOWN = 20
"""Failures listed in the record."""
SECONDS, MEMORY_MIB = 5.0, 4096
"""Limits per answer: the recipe's defaults."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("OPO_TEST_DATA")
    parser.add_argument("--data", metavar="DIR", type=Path, default=Path(default) if default else None)
    parser.add_argument("--workers", metavar="N", type=int, default=2)
    parser.add_argument("--limit", metavar="N", type=int, help="number of problems; writes no record")
    arguments = parser.parse_args()
    if arguments.data is None or not (arguments.data / "math").is_dir():
        parser.error("--data DIR (or OPO_TEST_DATA) must name the folder of math/ and gsm8k/")
    all_solutions = solutions(arguments.data)
    if arguments.limit is not None:
        all_solutions = random.Random(0).sample(all_solutions, min(arguments.limit, len(all_solutions)))
    pool = WorkerPool(arguments.workers, SECONDS, MEMORY_MIB)
    try:
        results = {"workers": arguments.workers} | measure(pool, all_solutions)
    finally:
        pool.close()
    print(json.dumps(results, indent=2, ensure_ascii=False))
    if arguments.limit is None:
        print(f"written to {write_record('verifier', results)}")
    return 0


def measure(pool: WorkerPool, all_solutions: Sequence[Solution]) -> dict[str, Any]:
    """Acceptance rates, and answers per second."""
    pool.grade([(boxed("1"), "1")] * WARM_UP)
    wrong = wrong_answers(list(all_solutions), min(WRONG_OF, len(all_solutions)))
    started, graded = time.perf_counter(), 0
    results: dict[str, Any] = {}
    for name, members in (
        ("MATH", [solution for solution in all_solutions if solution.kind != "gsm8k"]),
        ("GSM8K", [solution for solution in all_solutions if solution.kind == "gsm8k"]),
    ):
        golds = [reference(solution.text) for solution in members]
        for what, texts in (
            ("gold answers", [boxed(gold) for gold in golds]),
            ("reference solutions", [solution.text for solution in members]),
        ):
            if (name, what) == ("GSM8K", "reference solutions"):
                continue  # they have no box
            pairs = list(zip(texts, golds, strict=True))
            rewards = pool.grade(pairs)
            graded += len(pairs)
            failed = [gold for gold, reward in zip(golds, rewards, strict=True) if reward != 1]
            results[f"{what} of {name}"] = rate(len(pairs), len(pairs) - len(failed), "refused", failed)
    for change in dict.fromkeys(one.change for one in wrong):
        tried = [one for one in wrong if one.change == change]
        rewards = pool.grade([(boxed(one.answer), one.gold) for one in tried])
        graded += len(tried)
        passed = [f"{one.answer} for {one.gold}" for one, r in zip(tried, rewards, strict=True) if r]
        results[f"wrong: {change}"] = rate(len(tried), len(passed), "accepted", passed)
    seconds = time.perf_counter() - started
    results["answers per second"] = round(graded / seconds, 1)
    results["answers graded"] = graded
    results["time-outs"], results["crashes"] = pool.timeouts, pool.crashes
    return results


def rate(count: int, accepted: int, failure: str, failed: Sequence[str]) -> dict[str, Any]:
    return {
        "answers": count,
        "accepted": accepted,
        "share accepted": accepted / max(1, count),
        f"first {failure}": list(failed[:SHOWN]),
    }


if __name__ == "__main__":
    sys.exit(main())
