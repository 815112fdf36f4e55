"""A disk that fills up during a save: existing checkpoints stay valid, the run continues or stops.

The disk is a small tmpfs, which needs root to mount.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.interrupted import COMMAND, attempts
from tests.support.tiny_run import lasting, rows

STEPS = 6
SHORT = (*COMMAND, "warm_start.steps=0", f"train.steps={STEPS}", "checkpoint.every_steps=1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert attempts(run_dir, command=SHORT) == [0]
    return run_dir


def mount(folder: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path, uninterrupted: Path) -> Iterator[Path]:
    """A run folder whose disk fits two and a half checkpoints."""
    one = sum(path.stat().st_size for path in (uninterrupted / "checkpoints" / "step_00000001").iterdir())
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    try:
        mount(folder, f"size={5 * one // 2}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine does not let tests mount a tmpfs: {error.stderr.decode().strip()}")
    try:
        yield folder.parent
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("on_failure", "last"), [("stop", 4), ("continue", STEPS)])
def test_the_run_continues_or_stops_and_saved_checkpoints_stay_valid(
    small_disk: Path, uninterrupted: Path, on_failure: str, last: int
) -> None:
    command = (*SHORT, f"checkpoint.on_failure={on_failure}")
    # The save of step 3 fails in the background and is reported a step later.  The last checkpoint is
    # the run's result: without it the run fails in any case.
    assert attempts(small_disk, command=command) == [2]
    assert [row["step"] for row in rows(small_disk)] == list(range(last + 1))
    folder = small_disk / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]
    mount(folder, "remount", "size=1g")
    assert attempts(small_disk, command=command) == [0]
    assert lasting(small_disk) == lasting(uninterrupted)
    assert [row["run/attempt"] for row in rows(small_disk)] == [1, 1, 1, 2, 2, 2, 2]
