"""A user's verifier is a guest: what it does costs its own sample or is named, and nothing is left behind."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.graders import Grader, Submission
from opo_megatron.tasks.stray_processes import MARK
from opo_megatron.tasks.user_verifier import source_hash
from opo_megatron.tasks.worker_pool import WorkerPool
from tests.support.hostile_verifiers import USUAL
from tests.support.paths import ROOT

Grade = Callable[..., tuple[list[float | None], WorkerPool]]


@pytest.fixture
def grade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Grade]:
    """Grades responses with a verifier of `hostile.py`, and checks that no process is left."""
    shutil.copy(ROOT / "tests" / "support" / "hostile_verifiers.py", tmp_path / "hostile.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hostile", raising=False)
    opened: list[Grader] = []

    def run(name: str, *responses: str, **settings: object) -> tuple[list[float | None], WorkerPool]:
        limits = {"verifier_workers": 1, "verifier_seconds": 1.5, "verifier_memory_mib": 700, **settings}
        grader = Grader(TaskConfig(name="text", verifier=f"hostile:{name}", **limits))
        opened.append(grader)
        grader.start()
        rewards = grader.grade([Submission(Prompt(0, "1+1=", (), "2"), response) for response in responses])
        return rewards, grader._backend  # type: ignore[return-value]

    yield run
    for grader in opened:
        grader.close()
    assert [pid for grader in opened for pid in marked(grader)] == []


def marked(grader: Grader) -> list[int]:
    """Processes that a grader's workers, or the verifiers in them, have started."""
    mark = getattr(grader._backend, "_mark", None)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


OWN = ["pool", "terminate", "thread", "elsewhere", "printing", "fork", "daemon", "late"]
DEFAULT = ["hang", "garbage", "exits", "memory", "kill_self", "kill_parent", "leave", "stop"]
QUICK = ("pool", "exits", "sys_exit", "text")
MISTAKES = {
    "sys_exit": r"hostile:sys_exit raised SystemExit \(0\) for the answer '2' and the response 'trigger'; it",
    "interrupt": "hostile:interrupt raised KeyboardInterrupt for",
    "farewell": r"hostile:farewell raised Farewell \(good bye\) for",
    "error": r"hostile:error raised ValueError \(no sense\) for",
    "text": "hostile:text returned '1.0' for .* 'trigger'; it must return a finite number for any text",
    "nothing": "hostile:nothing returned None for",
    "mute": r"hostile:mute raised Mute \(no text\) for",
    "own_timeout": r"hostile:own_timeout raised TimeoutError \(mine\) for",
    "mapping": "hostile:mapping returned {.*} for a batch, which is no list for",
    "infinite": "hostile:infinite returned inf for",
    "short": "hostile:short returned 1 rewards for 2 responses for",
}


def tiers(names: list[str]) -> list[object]:
    """One case of each kind is quick; the others are run by the slow tests."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", tiers(OWN))
def test_a_verifier_may_fork_print_and_wait_and_its_reward_counts(grade: Grade, name: str) -> None:
    rewards, pool = grade(name, "a", "trigger", "b")
    assert rewards == [USUAL, 1.0, USUAL] and (pool.timeouts, pool.crashes) == (0, 0)


@pytest.mark.parametrize("name", tiers(DEFAULT))
def test_a_hang_or_death_costs_one_sample_its_counted_default(grade: Grade, name: str) -> None:
    rewards, pool = grade(name, "a", "trigger", "b", "trigger", "c")
    assert rewards == [USUAL, None, USUAL, None, USUAL]
    assert name == "memory" or pool.timeouts + pool.crashes == 2


@pytest.mark.parametrize("name", tiers(list(MISTAKES)))
def test_a_mistake_of_the_verifier_is_a_sentence_that_names_it(grade: Grade, name: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[name]) as error:
        grade(name, "a", "trigger")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [("missing", "AttributeError"), ("not_a_function", "not_a_function is not a function")],
)
def test_what_cannot_be_loaded_is_named_at_the_start(grade: Grade, name: str, words: str) -> None:
    with pytest.raises(UserError, match=f"task.verifier=hostile:{name} cannot be loaded: .*{words}"):
        grade(name)


def test_keys_are_not_in_the_environment_of_a_verifier(grade: Grade, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["WANDB_API_KEY", "HF_TOKEN", "MY_SERVER_KEY", "AWS_SECRET_ACCESS_KEY", "REWARD_KEY"]
    for name in (*keys, "MY_SETTING"):
        monkeypatch.setenv(name, "value")
    rewards, _ = grade("shows_environment", *keys, "MY_SETTING", "PATH")
    assert rewards == [0.0] * len(keys) + [1.0, 1.0]


def test_a_changed_source_behind_a_wrapper_is_noticed(tmp_path: Path) -> None:
    module = types.ModuleType("wrapped")
    sys.modules["wrapped"] = module
    try:
        (tmp_path / "wrapped.py").write_text("one")
        module.__file__ = str(tmp_path / "wrapped.py")
        hashes = [source_hash("wrapped:part", functools.partial(len)), source_hash("wrapped:part", len)]
        (tmp_path / "wrapped.py").write_text("two")
        assert source_hash("wrapped:part", functools.partial(len)) not in [None, *hashes]
        assert source_hash("builtins:len", len) is None
    finally:
        del sys.modules["wrapped"]


def test_asynchronous_verifiers_run_at_the_same_time(grade: Grade) -> None:
    rewards, pool = grade("asynchronous", *["a"] * 40, verifier_seconds=5.0)
    assert rewards == [USUAL] * 40 and (pool.timeouts, pool.crashes) == (0, 0)


@pytest.mark.slow
def test_asynchronous_and_batch_verifiers_lose_only_the_sample_that_hangs(grade: Grade) -> None:
    assert grade("asynchronous", "a", "trigger", "b")[0] == [USUAL, None, USUAL]
    assert grade("batch", "a", "trigger", "default", verifier_seconds=0.7)[0] == [USUAL, None, None]
    assert grade("judge", "a", "b")[0] == [USUAL, USUAL]


@pytest.mark.parametrize("in_process", [False, True])
def test_batches_are_taken_as_they_are(grade: Grade, in_process: bool) -> None:
    settings = {"verifier_in_process": in_process, "verifier_batch": 2}
    assert grade("asynchronous_batch", "a", "b", "c", **settings)[0] == [4.0] * 3


@pytest.mark.parametrize("in_process", [False, True])
def test_a_fork_that_returns_is_not_a_second_run(grade: Grade, tmp_path: Path, in_process: bool) -> None:
    """Each process that went on from here would write a line."""
    rewards, _ = grade("fork", "a", "trigger", "trigger", "b", verifier_in_process=in_process)
    with (tmp_path / "processes").open("a") as file:
        file.write("one\n")
    time.sleep(0.5)
    assert rewards == [USUAL, 1.0, 1.0, USUAL]
    assert (tmp_path / "processes").read_text() == "one\n"


def test_in_the_training_process_a_mistake_is_the_same_sentence(
    grade: Grade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("sys_exit", "farewell", "text"):
        with pytest.raises(UserError, match=MISTAKES[name]):
            grade(name, "a", "trigger", verifier_in_process=True)
    assert os.getcwd() == str(tmp_path)
