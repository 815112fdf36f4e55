"""Checkpoints written in the background: the same bytes as synchronous ones, complete or absent."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from opo_megatron.checkpoint import writer as checkpoint_writer
from opo_megatron.checkpoint.load import load
from opo_megatron.checkpoint.progress import RunProgress, damage_of
from opo_megatron.checkpoint.save import PendingCheckpoint, save
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.errors import SaveError
from opo_megatron.policy.policy import Policy
from tests.support.fixtures import small_config, small_policy
from tests.support.tiny_run import lasting, train

PROGRESS = RunProgress("step", 1)


def test_synchronous_and_asynchronous_saving_give_the_same_run(tmp_path: Path) -> None:
    small = ("warm_start.steps=2", "train.steps=2", "checkpoint.every_steps=1", "eval.greedy=false")
    for name in ("true", "false"):
        assert train(tmp_path / name, *small, f"checkpoint.asynchronous={name}") == 0
    assert lasting(tmp_path / "true") == lasting(tmp_path / "false")
    first, second = (
        sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        for name in ("true", "false")
    )
    assert first == second and len(first) == 4


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


@pytest.fixture
def policy(parallel: Parallel, tmp_path: Path) -> Policy:
    policy = small_policy(small_config(f"run.dir={tmp_path / 'run'}"), parallel)
    policy.allocate_optimizer_state()
    return policy


def tensors_of(run_dir: Path) -> dict[str, Any]:
    manifest = json.loads((run_dir / "checkpoints" / PROGRESS.folder / "manifest.json").read_text())
    return {name: entry for name, entry in manifest.items() if name.endswith(".distcp")}


def test_cancelling_a_save_ends_its_writer_process(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(*arguments: Any) -> None:
        (tmp_path / "writer.pid").write_text(str(os.getpid()))
        time.sleep(60)

    def is_gone(process: int) -> bool:
        try:
            return ") Z " in Path(f"/proc/{process}/stat").read_text()
        except FileNotFoundError:
            return True

    monkeypatch.setattr(checkpoint_writer.PlannedFiles, "write", hang)
    pending = PendingCheckpoint(
        policy, small_config(f"run.dir={tmp_path / 'run'}"), PROGRESS, in_background=True
    )
    _until(lambda: any(path.read_text() for path in tmp_path.glob("*.pid")))
    pending.cancel()
    for path in tmp_path.glob("*.pid"):
        _until(lambda path=path: is_gone(int(path.read_text())))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met within 30 s"
        time.sleep(0.02)


def test_a_background_save_writes_the_state_at_its_start(policy: Policy, tmp_path: Path) -> None:
    sync_config, async_config = (small_config(f"run.dir={tmp_path / name}") for name in ("sync", "async"))
    save(policy, sync_config, PROGRESS)
    extra = {"note": 1}
    pending = PendingCheckpoint(policy, async_config, PROGRESS, extra, in_background=True)
    extra["note"] = 2
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    policy.version = 99
    assert not (tmp_path / "async" / "checkpoints" / PROGRESS.folder).exists()
    pending.complete()
    assert tensors_of(tmp_path / "async") == tensors_of(tmp_path / "sync") != {}
    folder = tmp_path / "async" / "checkpoints" / PROGRESS.folder
    assert damage_of(folder, policy.parallel) is None
    load(policy, async_config, folder)
    assert policy.version == 0
    assert json.loads((folder / "run_state.json").read_text())["extra"] == {"note": 1}


def test_training_does_not_wait_for_the_disk(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, unblocked = checkpoint_writer._write, tmp_path / "unblocked"

    def blocked_write(*arguments: Any) -> Any:
        while not unblocked.exists():
            time.sleep(0.05)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "_write", blocked_write)
    pending = PendingCheckpoint(policy, small_config(f"run.dir={tmp_path}"), PROGRESS, in_background=True)
    assert not pending.is_written()
    unblocked.touch()
    while not pending.is_written():
        time.sleep(0.05)
    pending.complete()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [PROGRESS.folder]


def test_a_killed_writer_raises_a_save_error_and_leaves_no_files(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_write", lambda *arguments: os.kill(os.getpid(), SIGKILL))
    pending = PendingCheckpoint(policy, small_config(f"run.dir={tmp_path}"), PROGRESS, in_background=True)
    with pytest.raises(SaveError, match=r"cannot be written .*ended with code -9"):
        pending.complete()
    assert list((tmp_path / "checkpoints").iterdir()) == []
