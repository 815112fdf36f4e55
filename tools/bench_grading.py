"""Benchmarks grading by a user's function in worker processes, against this process → records/grading.json

python tools/bench_grading.py
python tools/bench_grading.py --responses 2000     # fewer; prints only

A cheap verifier: it searches a response of 2,000 characters for the answer's last occurrence and normalizes
it.  It is called for each response, and for a batch, by the pool with two workers and in this process, five
times in turns; the fastest call of each counts.  Counted before: a job is 2.1 kB of JSON, once in; two
workers on two cores halve the verifier's own time, and the pool's process encodes and decodes meanwhile.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from collections.abc import Sequence

from bench.record import write_record

from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.graders import Grader, Submission
from opo_megatron.utils.terminal import prepare_terminal

ROUNDS = 5
LENGTH = 2000
"""Characters of a response."""


def cheap(prompt: str, response: str, answer: str) -> float:
    """The last number of the response is the answer, in some 100 µs."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", response.lower().replace(",", ""))
    return float(bool(numbers) and numbers[-1] == answer)


def cheap_batch(prompts: Sequence[str], responses: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [cheap(*job) for job in zip(prompts, responses, answers, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", metavar="N", type=int, help="number of responses; writes no record")
    arguments = parser.parse_args()
    submissions = made(arguments.responses or 8192)
    os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    results: dict[str, object] = {
        "responses": len(submissions),
        "characters per response": LENGTH,
        "workers": 2,
    }
    for what, name in (("each", "cheap"), ("in batches of 64", "cheap_batch")):
        seconds = measured(f"bench_grading:{name}", submissions)
        rates = {where: round(len(submissions) / best, 1) for where, best in seconds.items()}
        ratio = round(rates["pool"] / rates["in process"], 3)
        results[what] = {"responses per second": rates, "pool over in process": ratio}
        print(f"{what}: {rates['pool']:,.0f} responses/s in the pool, {rates['in process']:,.0f} in process")
    if arguments.responses is None:
        print(f"written to {write_record('grading', results)}")
    return 0


def made(count: int) -> list[Submission]:
    rng = random.Random(0)
    words = [f"{rng.choice(['so', 'then', 'thus', 'we have'])} {rng.randint(0, 999)}" for _ in range(2000)]
    found = []
    for index in range(count):
        text = " ".join(rng.choices(words, k=300))[:LENGTH]
        found.append(Submission(Prompt(index, "What is it?", (), str(index)), f"{text} {index}"))
    return found


def measured(verifier: str, submissions: Sequence[Submission]) -> dict[str, float]:
    """Fewest seconds of the pool and of this process, in turns."""
    graders = {
        where: Grader(TaskConfig(name="text", verifier=verifier, verifier_in_process=where == "in process"))
        for where in ("pool", "in process")
    }
    best = dict.fromkeys(graders, float("inf"))
    try:
        for grader in graders.values():
            grader.start()
            grader.grade(submissions[:500])  # all workers are ready, regular expressions compiled
        for _ in range(ROUNDS):
            for where, grader in graders.items():
                started = time.perf_counter()
                rewards = grader.grade(submissions)
                best[where] = min(best[where], time.perf_counter() - started)
                assert rewards == [1.0] * len(submissions)
    finally:
        for grader in graders.values():
            grader.close()
    return best


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
