"""A process that hangs exits with the documented code, naming its phase and stacks; others are left alone."""

from __future__ import annotations

import json
import os
import socket
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
watchdog.show()
watchdog.enter("reward", 7)
stuck_in_here()
"""


def test_a_process_that_hangs_exits_and_reports_its_phase_and_stack(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == EXIT_HUNG, result.stderr
    assert result.stderr.count("\n") == 1
    assert "rank 0 makes no progress in phase reward of step 7 (process " in result.stderr
    assert "stuck_in_here" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert json.loads((tmp_path / "status" / "rank_00000.json").read_text())["phase"] == "reward"


EARLY = SCRIPT.replace("watchdog.show()\n", "").replace('enter("reward", 7)', 'enter("loading weights")')


def test_a_hang_before_the_run_has_its_folder_is_reported_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EARLY, str(tmp_path / "run")]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == EXIT_HUNG, result.stderr
    assert "rank 0 makes no progress in phase loading weights of step 0 (process " in result.stderr
    assert "stuck_in_here" in (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()


def status_of(rank: int, **changes: Any) -> dict[str, Any]:
    """What a living rank of this test's run writes."""
    return {
        "rank": rank, "host": socket.gethostname(), "pid": 10**7 + rank, "phase": "train", "step": 3,
        "seconds": 100.0, "count": 5,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"count": 6, "seconds": 0.0}, "waits"),
        ({"seconds": 0.0}, {"count": 6}, "is hung"),
        ({}, {"count": 6}, "is hung"),
        ({}, {}, "rank 1 is gone"),
        ({"seconds": 0.0}, {"seconds": 0.0}, "rank 1 is gone"),
        ({"pid": 1}, {"pid": 1}, "rank 1 is gone"),  # of an earlier attempt
    ],
    ids=["works", "stopped working", "waits as long", "stopped", "stopped at work", "of another attempt"],
)
def test_a_rank_waits_for_the_progress_of_another_one(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    before: dict[str, Any],
    after: dict[str, Any],
    expected: str,
) -> None:
    watchdog = Watchdog(parallel_of(world_size=2), tmp_path, minutes=1)
    watchdog._processes = [(socket.gethostname(), os.getpid()), (socket.gethostname(), 10**7 + 1)]
    watchdog._since -= 100  # this rank has waited for longer than its limit
    other = tmp_path / "status" / "rank_00001.json"
    other.parent.mkdir()
    other.write_text(json.dumps(status_of(1, **before)))
    monkeypatch.setattr(time, "sleep", lambda _: other.write_text(json.dumps(status_of(1, **after))))
    ends: list[list[int]] = []
    monkeypatch.setattr(watchdog, "_end", lambda _stacks, _now, unresponsive: ends.append(unresponsive))
    watchdog._look_around()
    assert ends == {"waits": [], "is hung": [[]], "rank 1 is gone": [[1]]}[expected]


def test_a_process_that_makes_progress_runs_on_and_leaves_no_files(tmp_path: Path) -> None:
    watchdog = Watchdog(parallel_of(), tmp_path, minutes=0.3 / 60)
    watchdog.start()
    watchdog.show()
    for step in range(4):
        watchdog.enter("train", step)
        for _ in range(4):
            time.sleep(0.05)
            watchdog.progress()
    status = json.loads((tmp_path / "status" / "rank_00000.json").read_text())
    assert (status["phase"], status["step"]) == ("train", 3) and status["seconds"] < 0.3
    watchdog.close()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_zero_minutes_disable_the_watchdog(tmp_path: Path) -> None:
    watchdog = Watchdog(parallel_of(), tmp_path, minutes=0)
    watchdog.start()
    watchdog.show()
    watchdog.enter("train", 1)
    watchdog.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("phases", "outliers"),
    [
        ([(3, "train"), (3, "train"), (3, "reward"), (3, "train")], [2]),
        ([(3, "train"), (2, "sync"), (3, "train")], [1]),
        ([(3, "train"), (3, "train")], [0, 1]),
    ],
)
def test_ranks_in_another_phase_than_most_are_reported(
    phases: list[tuple[int, str]], outliers: list[int]
) -> None:
    ranks: list[dict[str, Any]] = [
        {"rank": rank, "step": step, "phase": phase} for rank, (step, phase) in enumerate(phases)
    ]
    assert _outliers(ranks) == outliers
