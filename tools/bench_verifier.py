r"""Benchmarks the verifier `math` on all of MATH (12,500) and GSM8K (8,792) → records/verifier.json

python tools/bench_verifier.py --data DIR         # DIR/math and DIR/gsm8k
python tools/bench_verifier.py --limit 500        # 500 problems of $OPO_TEST_DATA; prints only

Right: every gold answer in a box, every reference solution of MATH, which has its own box, and other ways
to write gold answers.  Wrong: gold answers that a rule changed (`tools/bench/verifier_sets.py`); pairs that
a rule leaves equal are excluded before grading, and counted.  Speed: all of these per second, after 100
warm-up answers.
`math_strict`, which is math-verify alone, grades a sample of the same pairs in the same run.
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
from typing import Any, NamedTuple

from bench.record import write_record
from bench.verifier_sets import Solution, boxed, equal_answers, solutions, wrong_answers

from opo_megatron.tasks.math_answers import last_boxed, reference
from opo_megatron.tasks.worker_pool import WorkerPool
from opo_megatron.utils.terminal import prepare_terminal

SAMPLE = 1500
"""Pairs per set that `math_strict` grades."""
WARM_UP = 100
SHOWN = 20
"""Failures listed in the record."""
SECONDS, MEMORY_MIB = 5.0, 4096
"""Limits per answer: the recipe's defaults."""


class Sets(NamedTuple):
    """Pairs (response, gold) by what they are."""

    right: dict[str, list[tuple[str, str]]]
    wrong: dict[str, list[tuple[str, str]]]
    equal: dict[str, int]
    """Pairs that a rule left equal, per rule."""


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
    sets = make_sets(all_solutions)
    results: dict[str, Any] = {"workers": arguments.workers}
    for grader in ("math", "math_strict"):
        pool = WorkerPool(arguments.workers, SECONDS, MEMORY_MIB, grader=grader)
        try:
            results[grader] = measure(pool, sets if grader == "math" else sampled(sets))
        finally:
            pool.close()
    results["speed ratio"] = round(
        results["math"]["answers per second"] / results["math_strict"]["answers per second"], 1
    )
    print(json.dumps(results, indent=2, ensure_ascii=False))
    if arguments.limit is None:
        print(f"written to {write_record('verifier', results)}")
    return 0


def make_sets(all_solutions: Sequence[Solution]) -> Sets:
    right: dict[str, list[tuple[str, str]]] = {}
    for name, is_gsm8k in (("MATH", False), ("GSM8K", True)):
        members = [one.text for one in all_solutions if (one.kind == "gsm8k") is is_gsm8k]
        golds = [reference(text) for text in members]
        right[f"gold answers of {name}"] = [(boxed(gold), gold) for gold in golds]
        if not is_gsm8k:  # the solutions of GSM8K have no box
            right["reference solutions of MATH"] = list(zip(members, golds, strict=True))
    for pair in equal_answers(list(all_solutions), len(all_solutions)):
        right.setdefault(f"written {pair.change}", []).append((boxed(pair.answer), pair.gold))
    wrong: dict[str, list[tuple[str, str]]] = {}
    pairs, equal = wrong_answers(list(all_solutions), len(all_solutions))
    for pair in pairs:
        wrong.setdefault(pair.change, []).append((boxed(pair.answer), pair.gold))
    return Sets(right, wrong, dict(equal))


def sampled(sets: Sets) -> Sets:
    rng = random.Random(0)
    right, wrong = (
        {name: rng.sample(pairs, min(SAMPLE, len(pairs))) for name, pairs in part.items()}
        for part in (sets.right, sets.wrong)
    )
    return Sets(right, wrong, {})


def measure(pool: WorkerPool, sets: Sets) -> dict[str, Any]:
    """Acceptance rates, and answers per second."""
    pool.grade([(boxed("1"), "1")] * WARM_UP)
    started = time.perf_counter()
    results: dict[str, Any] = {}
    for part, is_right in ((sets.right, True), (sets.wrong, False)):
        for name, pairs in part.items():
            rewards = pool.grade(pairs)
            accepted = sum(reward == 1 for reward in rewards)
            failed = [
                f"{last_boxed(response)} for {gold}"
                for (response, gold), reward in zip(pairs, rewards, strict=True)
                if (reward == 1) is not is_right
            ]
            title = name if is_right else f"wrong: {name}"
            results[title] = rate(len(pairs), accepted, "refused" if is_right else "accepted", failed)
            if name in sets.equal and not is_right:
                results[title]["excluded as equal"] = sets.equal[name]
    seconds = time.perf_counter() - started
    results["wrong: all"] = total([results[f"wrong: {name}"] for name in sets.wrong])
    results["right: all"] = total([results[name] for name in sets.right])
    graded = results["wrong: all"]["answers"] + results["right: all"]["answers"]
    results["answers per second"] = round(graded / seconds, 1)
    results["answers graded"] = graded
    results["time-outs"], results["crashes"] = pool.timeouts, pool.crashes
    return results


def total(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    answers, accepted = (sum(one[key] for one in rates) for key in ("answers", "accepted"))
    return {"answers": answers, "accepted": accepted, "share accepted": accepted / max(1, answers)}


def rate(count: int, accepted: int, failure: str, failed: Sequence[str]) -> dict[str, Any]:
    return {
        "answers": count,
        "accepted": accepted,
        "share accepted": accepted / max(1, count),
        f"first {failure}": list(failed[:SHOWN]),
    }


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
