"""Checkpoints that a process beside the training writes: the same bytes, whole or not there."""

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
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

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


def test_a_run_that_waits_for_its_checkpoints_is_the_same(tmp_path: Path) -> None:
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
    made = small_policy(small_config(f"run.dir={tmp_path / 'run'}"), parallel)
    made.allocate_optimizer_state()
    return made


def tensors_of(run_dir: Path) -> dict[str, Any]:
    manifest = json.loads((run_dir / "checkpoints" / PROGRESS.folder / "manifest.json").read_text())
    return {name: entry for name, entry in manifest.items() if name.endswith(".distcp")}


def test_processes_that_write_end_with_the_one_that_started_them(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would wait for ever for a queue of which one end was killed."""

    def hang(*arguments: Any, local_proc_idx: int, **more: Any) -> None:
        (tmp_path / f"{local_proc_idx}.pid").write_text(str(os.getpid()))
        time.sleep(60)

    def is_gone(process: int) -> bool:
        try:
            return ") Z " in Path(f"/proc/{process}/stat").read_text()
        except FileNotFoundError:
            return True

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(hang))
    saving = PendingCheckpoint(
        policy, small_config(f"run.dir={tmp_path / 'run'}"), PROGRESS, in_background=True
    )
    _until(lambda: any(path.read_text() for path in tmp_path.glob("*.pid")))
    saving.cancel()
    for path in tmp_path.glob("*.pid"):
        _until(lambda path=path: is_gone(int(path.read_text())))


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_what_is_written_is_the_state_of_the_beginning(policy: Policy, tmp_path: Path) -> None:
    here, in_background = (small_config(f"run.dir={tmp_path / name}") for name in ("here", "beside"))
    save(policy, here, PROGRESS)
    extra = {"note": 1}
    saving = PendingCheckpoint(policy, in_background, PROGRESS, extra, in_background=True)
    extra["note"] = 2
    with torch.no_grad():
        for chunk in policy.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    policy.version = 99
    assert not (tmp_path / "beside" / "checkpoints" / PROGRESS.folder).exists()
    saving.complete()
    assert tensors_of(tmp_path / "beside") == tensors_of(tmp_path / "here") != {}
    folder = tmp_path / "beside" / "checkpoints" / PROGRESS.folder
    assert damage_of(folder, policy.parallel) is None
    load(policy, in_background, folder)
    assert policy.version == 0
    assert json.loads((folder / "run_state.json").read_text())["extra"] == {"note": 1}


def test_training_does_not_wait_for_the_disk(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, answers = checkpoint_writer._write, tmp_path / "the disk answers"

    def waiting(*arguments: Any) -> Any:
        while not answers.exists():
            time.sleep(0.05)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "_write", waiting)
    saving = PendingCheckpoint(policy, small_config(f"run.dir={tmp_path}"), PROGRESS, in_background=True)
    assert not saving.is_written()
    answers.touch()
    while not saving.is_written():
        time.sleep(0.05)
    saving.complete()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [PROGRESS.folder]


def test_a_writer_that_dies_is_a_sentence_and_leaves_nothing(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "_write", lambda *arguments: os.kill(os.getpid(), SIGKILL))
    saving = PendingCheckpoint(policy, small_config(f"run.dir={tmp_path}"), PROGRESS, in_background=True)
    with pytest.raises(SaveError, match=r"cannot be written .*ended with code -9"):
        saving.complete()
    assert list((tmp_path / "checkpoints").iterdir()) == []
