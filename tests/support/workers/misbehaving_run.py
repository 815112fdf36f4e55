"""Runs in which anybody's code misbehaves, as a task or a library may.

misbehaving_run.py CASES ARGUMENT...

A case is [deed, moment] or [deed, moment, rank]: what happens (`DEEDS`), when (`MOMENTS`), and on which rank.
A rank runs the only one; otherwise each runs `opo ARGUMENT...` in a child, forked after all imports, with
run.dir="run NUMBER", and the list of exit codes is printed as the last line.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opo_megatron import build
from opo_megatron.cli.main import main
from opo_megatron.evaluation import evaluate
from opo_megatron.tasks.lift import LiftTask
from opo_megatron.updates import sample_batch
from tests.support.tiny_run import easy_reward

ELSEWHERE = Path.cwd() / "elsewhere"


def move() -> None:
    """Change the folder and the one for temporary files, and delete the one that was."""
    ELSEWHERE.mkdir(exist_ok=True)
    os.chdir(ELSEWHERE)
    shutil.rmtree(os.environ.get("TMPDIR", ELSEWHERE / "nothing"), ignore_errors=True)
    os.environ["TMPDIR"] = str(ELSEWHERE / "nothing")


def terminate_a_child() -> None:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    process.terminate()
    process.join()
    assert process.exitcode == -15, process.exitcode


def terminate_a_pool() -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:  # terminated at the end
        pool.apply_async(time.sleep, (600,))


DEEDS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "move": move,
    "terminate a child": terminate_a_child,
    "terminate a pool": terminate_a_pool,
    "exit": lambda: sys.exit(0),
    "exit as if saved": lambda: sys.exit(75),
    "leave": lambda: os._exit(0),
    "leave as if saved": lambda: os._exit(75),
    "leave by C": lambda: ctypes.CDLL(None)._exit(0),
    "sleep": lambda: time.sleep(600),
    "match": lambda: re.match("(a+)+b", "a" * 60),
    "poll": lambda: ctypes.CDLL(None).poll(None, 0, 600_000),
}
MOMENTS: dict[str, list[tuple[Any, str, int | None]]] = {
    "start": [(build, "make_task", 1)],
    "evaluation": [(evaluate, "compute_rewards", 1)],
    "step 2": [(sample_batch, "compute_rewards", 2)],
    "always": [
        (build, "make_task", None),
        (evaluate, "compute_rewards", None),
        (sample_batch, "compute_rewards", None),
    ],
}
"""The functions that do it first: module, name, and at which call; None is every call."""


def inject(deed: str, module: Any, name: str, at: int | None) -> None:
    function, calls = getattr(module, name), 0

    def misbehaving(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if at is None or calls == at:
            print(f"now: {deed}", flush=True)
            DEEDS[deed]()
        return function(*arguments)

    setattr(module, name, misbehaving)


def run(case: list[str], arguments: list[str]) -> int:
    deed, moment, *rank = case
    LiftTask.reward = easy_reward  # type: ignore[method-assign]
    if not rank or rank == [os.environ["RANK"]]:
        for place in MOMENTS[moment]:
            inject(deed, *place)
    return main(arguments)


def forked(case: list[str], arguments: list[str]) -> int:
    if (child := os.fork()) == 0:
        code = 1
        try:
            code = run(case, arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    cases, command = json.loads(sys.argv[1]), sys.argv[2:]
    if "RANK" in os.environ:
        sys.exit(run(cases[0], command))
    print(json.dumps([forked(case, [*command, f"run.dir=run {n}"]) for n, case in enumerate(cases)]))
