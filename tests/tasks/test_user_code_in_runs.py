"""Users' code in runs of two ranks, by `--nproc` and by the job script; workers that are killed at random."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from opo_megatron.config.schema import TaskConfig
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.graders import Grader, Submission
from opo_megatron.tasks.stray_processes import MARK
from opo_megatron.tasks.worker_pool import WorkerPool
from tests.support.fixtures import RECIPE
from tests.support.paths import ROOT
from tests.support.tiny_run import TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NIGHT = """
import hostile

def __getattr__(name):
    act = getattr(hostile, name)
    return lambda prompt, text, answer: act(prompt, "trigger" if len(text) % 3 == 0 else text, answer)
"""
PATIENT = """
import time

def reward(prompt, response, answer):
    time.sleep(0.002)
    return len(response) / 100
"""
TASK_CLASS = """
from examples.counting_task import CountingTask

class Leaving(CountingTask):
    def reward(self, prompt, response):
        raise SystemExit(0)
"""


def by_nproc(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "opo_megatron", "train", *arguments, "--nproc", "2"]


def by_node_script(folder: Path, *arguments: str) -> list[str]:
    return ["bash", str(ROOT / "slurm" / "node.sh"), "opo_megatron", "train", *arguments]


def run(launcher: Callable[..., list[str]], folder: Path, *settings: str) -> tuple[int, str]:
    """Exit code and output of a tiny run of two ranks."""
    shutil.copy(ROOT / "tests" / "support" / "hostile_verifiers.py", folder / "hostile.py")
    (folder / "night.py").write_text(NIGHT)
    (folder / "leaving.py").write_text(TASK_CLASS)
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        str(RECIPE),
        f"run.dir={folder / 'run'}",
        *TINY,
        "train.steps=2",
        "warm_start.steps=0",
        *settings,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'tests'}",
        "OPO_PYTHON": sys.executable,
        "OPO_RANKS_PER_NODE": "2",
        "OPO_NODES": "1",
        "OPO_RENDEZVOUS": f"127.0.0.1:{29500 + os.getpid() % 1000}",
        "OPO_RENDEZVOUS_ID": "guest",
        "OPO_AGAIN": str(folder / "again"),
    }
    done = subprocess.run(
        launcher(folder, *arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout + done.stderr


def left_behind() -> list[int]:
    """Grading processes of anybody but this test's process."""
    found = []
    for process in psutil.process_iter():
        try:
            if MARK in process.environ():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


TEXT = ["task.name=text", "task.verifier_seconds=1.5", "task.max_prompt_tokens=20", "task.verifier_workers=1"]


@pytest.mark.parametrize("launcher", [by_nproc, by_node_script])
@pytest.mark.parametrize("name", ["daemon", "exits", "kill_parent", "hang"])
def test_a_run_goes_on_whatever_its_verifier_does(tmp_path: Path, launcher: Callable, name: str) -> None:
    data = f"task.data={tmp_path / 'data.jsonl'}"
    code, output = run(launcher, tmp_path, *TEXT, data, f"task.verifier=night:{name}")
    assert code == 0, output[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    failures = rows[-1]["run/verifier_failures"]
    assert rows[-1]["step"] == 2 and (failures == 0 if name == "daemon" else failures > 0)
    assert left_behind() == []


@pytest.mark.parametrize("launcher", [by_nproc, by_node_script])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["task.verifier=night:sys_exit"],
            "the verifier night:sys_exit raised SystemExit (0) for the answer",
        ),
        (["task.verifier=night:text"], "the verifier night:text returned '1.0' for the answer"),
        (
            ["task.name=leaving:Leaving", "task.max_prompt_tokens=8"],
            "task.name=leaving:Leaving raised SystemExit (0) in rewards; correct it",
        ),
    ],
)
def test_a_mistake_ends_the_run_with_its_sentence(
    tmp_path: Path, launcher: Callable, settings: list[str], words: str
) -> None:
    code, output = run(launcher, tmp_path, *TEXT, f"task.data={tmp_path / 'data.jsonl'}", *settings)
    assert code == 2 and words in output, output[-2000:]
    assert left_behind() == []


def test_workers_killed_at_random_change_no_reward_but_lost_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patient.py").write_text(PATIENT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    submissions = [Submission(Prompt(i, "p", (), "a"), "x" * (i % 97)) for i in range(3000)]
    grader = Grader(TaskConfig(name="text", verifier="patient:reward", verifier_workers=3))
    pool = grader._backend
    assert isinstance(pool, WorkerPool)
    grader.start()
    rng, done = random.Random(0), threading.Event()

    def kill() -> None:
        """Every 150 ms the guardian or the child of a worker that is grading."""
        while not done.wait(0.15):
            for guardian in [worker.process.pid for worker in list(pool._workers) if worker.mode][:1]:
                with suppress(psutil.Error, ProcessLookupError):
                    children = [child.pid for child in psutil.Process(guardian).children()]
                    os.kill(rng.choice([guardian, *children]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    started = time.monotonic()
    rewards = grader.grade(submissions)
    done.set()
    grader.close()
    lost = rewards.count(None)
    assert 3 <= lost < 200 and time.monotonic() - started < 120
    pairs = zip(rewards, submissions, strict=True)
    assert all(reward in (None, len(one.response) / 100) for reward, one in pairs)
    assert pool.crashes + pool.timeouts == lost and left_behind() == []
