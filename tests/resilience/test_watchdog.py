"""A process that hangs is ended with its phase, its stacks and the documented code; one that works is not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opo_megatron.errors import EXIT_HUNG
from opo_megatron.resilience.watchdog import Watchdog, _outliers
from tests.support.coordinates import parallel_of

SCRIPT = """
import sys, time
from pathlib import Path
from tests.support.coordinates import parallel_of
from opo_megatron.resilience.watchdog import Watchdog

def stuck_in_here():
    time.sleep(60)

watchdog = Watchdog(parallel_of(), Path(sys.argv[1]), minutes=0.02)
watchdog.start()
watchdog.enter("reward", 7)
stuck_in_here()
"""


def test_a_process_that_hangs_is_ended_and_says_where(tmp_path: Path) -> None:
    line = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EXIT_HUNG, done.stderr
    assert done.stderr.count("\n") == 1
    assert "rank 0 makes no progress in phase reward of step 7 (process " in done.stderr
    assert "stuck_in_here" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert json.loads((tmp_path / "status" / "rank_00000.json").read_text())["phase"] == "reward"


def test_a_process_with_progress_is_left_alone_and_leaves_no_files(tmp_path: Path) -> None:
    watchdog = Watchdog(parallel_of(), tmp_path, minutes=0.3 / 60)
    watchdog.start()
    for step in range(4):
        watchdog.enter("train", step)
        for _ in range(4):
            time.sleep(0.05)
            watchdog.progress()
    status = json.loads((tmp_path / "status" / "rank_00000.json").read_text())
    assert (status["phase"], status["step"]) == ("train", 3) and status["seconds"] < 0.3
    watchdog.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_0_turns_it_off(tmp_path: Path) -> None:
    watchdog = Watchdog(parallel_of(), tmp_path, minutes=0)
    watchdog.start()
    watchdog.enter("train", 1)
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("places", "blamed"),
    [
        ([(3, "train"), (3, "train"), (3, "reward"), (3, "train")], [2]),
        ([(3, "train"), (2, "sync"), (3, "train")], [1]),
        ([(3, "train"), (3, "train")], [0, 1]),
    ],
)
def test_who_is_elsewhere_than_most_is_to_blame(places: list[tuple[int, str]], blamed: list[int]) -> None:
    ranks: list[dict[str, Any]] = [
        {"rank": rank, "step": step, "phase": phase} for rank, (step, phase) in enumerate(places)
    ]
    assert _outliers(ranks) == blamed
