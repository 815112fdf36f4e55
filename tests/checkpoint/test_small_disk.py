"""A disk that is full while a checkpoint is written: what was there stays valid, the run goes on or stops.

The disk is a small tmpfs, which only root may mount.
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
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "calm"
    assert attempts(run_dir, command=SHORT) == [0]
    return run_dir


def mount(folder: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path, calm: Path) -> Iterator[Path]:
    """A run's folder whose checkpoints have room for two and a half."""
    one = sum(path.stat().st_size for path in (calm / "checkpoints" / "step_00000001").iterdir())
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
    small_disk: Path, calm: Path, on_failure: str, last: int
) -> None:
    command = (*SHORT, f"checkpoint.on_failure={on_failure}")
    # Step 3 fails beside the training and is known a step later.  The last checkpoint is the run's result:
    # without it the run fails in any case.
    assert attempts(small_disk, command=command) == [2]
    assert [row["step"] for row in rows(small_disk)] == list(range(last + 1))
    folder = small_disk / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]
    mount(folder, "remount", "size=1g")
    assert attempts(small_disk, command=command) == [0]
    assert lasting(small_disk) == lasting(calm)
    assert [row["run/attempt"] for row in rows(small_disk)] == [1, 1, 1, 2, 2, 2, 2]
