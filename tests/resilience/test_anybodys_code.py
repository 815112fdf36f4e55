"""Whatever anybody's code does in a rank: a run is done when its last step is, its files stay in place."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from typing import Any

import pytest

from opo_megatron.distributed.outcome import ended_by_second
from opo_megatron.errors import EXIT_HUNG, EXIT_PREEMPTED
from opo_megatron.resilience.second_signal import FIRST
from tests.support.fixtures import RECIPE, SMALL_MODEL
from tests.support.paths import ROOT, WORKERS
from tests.support.slurm_job import NAMES, Job
from tests.support.tiny_run import lasting

WORKER = WORKERS / "misbehaving_run.py"
COMMAND = (
    "train",
    str(RECIPE),
    *SMALL_MODEL,
    "policy.model.num_layers=2",
    "policy.max_tokens_per_micro_batch=1000",
    "warm_start.steps=0",
    "train.steps=3",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "eval.every_steps=0",
    "eval.problems=8",
    "checkpoint.every_steps=1",
    "observe.tensorboard=false",
    "resume=auto",
)
LAUNCH = "import sys; from opo_megatron.distributed.launch import run_ranks; "
LAUNCH += "sys.exit(run_ranks(sys.argv[1:], 2, writes_outcome=True))"


def runs(folder: Path, *cases: list[str], **variables: str) -> tuple[list[int], str]:
    """Exit codes and errors of a run of one process for each case, in `folder`."""
    command = [sys.executable, str(WORKER), json.dumps(cases), *COMMAND]
    environment = {**os.environ, **variables}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    return list(json.loads(result.stdout.splitlines()[-1])), result.stderr


def start_ranks(folder: Path, case: list[str], *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """A run of two ranks, in `folder`."""
    arguments = [sys.executable, str(WORKER), json.dumps([case]), *COMMAND, *overrides]
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments],
        cwd=folder, env={**os.environ, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def curve(run_dir: Path) -> list[dict[str, Any]]:
    return lasting(run_dir)


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that were started in `folder` or below."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(folder):
                found.append((process / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue
    return [line for line in found if line]


def test_paths_are_those_of_the_start_and_a_call_of_exit_is_an_error(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    codes, errors = runs(tmp_path, ["move", "always"], ["exit", "step 2"], TMPDIR=str(temporary))
    assert codes == [0, 1]
    assert [row["step"] for row in curve(tmp_path / "run 0")] == [0, 1, 2, 3]
    assert not temporary.exists() and list((tmp_path / "elsewhere").iterdir()) == []
    assert errors.startswith(
        "error: the run ended with exit code 0 before its last step (1 of 3): <lambda> ("
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "evaluation", "step 2"])
def test_a_call_of_exit_never_ends_a_run_of_one_process_as_if_it_were_done(
    tmp_path: Path, moment: str
) -> None:
    codes, errors = runs(tmp_path, ["exit", moment], ["exit as if saved", moment], ["nothing", moment])
    assert codes == [1, 1, 0]
    assert errors.count("error: the run ended with exit code ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("deed", ["terminate a child", "terminate a pool"])
def test_children_of_a_run_can_be_terminated_at_any_moment(tmp_path: Path, deed: str) -> None:
    codes, errors = runs(tmp_path, [deed, "start"], [deed, "always"], [deed, "step 2"])
    assert codes == [0, 0, 0] and "SIGTERM" not in errors
    assert len(curve(tmp_path / "run 1")) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "moment", "rank"),
    [
        ("exit", "evaluation", "0"),
        ("exit", "step 2", "1"),
        ("exit as if saved", "step 2", "0"),
        ("exit as if saved", "evaluation", "1"),
        ("leave", "step 2", "0"),
        ("leave", "step 2", "1"),
        ("leave as if saved", "evaluation", "0"),
        ("leave as if saved", "step 2", "1"),
        ("leave by C", "step 2", "1"),
    ],
)
def test_a_rank_of_two_that_leaves_early_is_named(tmp_path: Path, deed: str, moment: str, rank: str) -> None:
    process = start_ranks(tmp_path, [deed, moment, rank], "run.dir=run")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and f"now: {deed}" in output
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and " called exit; remove that call" in lines[0], errors
    code, step = 75 if "saved" in deed else 0, {"evaluation": 0, "step 2": 1}[moment]
    who = "the run" if deed.startswith("exit") else f"rank {rank}"
    assert lines[0].startswith(
        f"error: {who} ended with exit code {code} before its last step ({step} of 3): "
    )
    assert processes_of(tmp_path) == []
    finished = curve(tmp_path / "run") if moment == "step 2" else []
    assert [row["step"] for row in finished] == [0, 1][: 2 * step]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_two_ranks_in_folders_of_any_name_write_what_they_should(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    process = start_ranks(folder, ["move", "always"], f"run.dir={name}/{name}", TMPDIR=str(temporary))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [row["step"] for row in curve(folder / name / name)] == [0, 1, 2, 3]
    assert {path.name for path in folder.iterdir()} == {"elsewhere", name.split("/")[0]}
    assert list((folder / "elsewhere").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "moment"),
    [
        ("sleep", "start"),
        ("sleep", "step 2"),
        ("match", "step 2"),
        ("poll", "evaluation"),
        ("poll", "step 2"),
    ],
)
def test_a_second_sigterm_ends_two_ranks_that_hang(tmp_path: Path, deed: str, moment: str) -> None:
    process = start_ranks(tmp_path, [deed, moment], "run.dir=run")
    assert process.stdout is not None
    while f"now: {deed}" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(SIGTERM)
    started = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert process.returncode == 128 + SIGTERM
    assert [line for line in errors.splitlines() if line != FIRST] == [ended_by_second("SIGTERM")]
    assert processes_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "phase"),
    [
        ("start", "loading the task of step 0"),
        ("evaluation", "eval reward of step 0"),
        ("step 2", "reward of step 2"),
    ],
)
@pytest.mark.parametrize("rank", [[], ["1"]], ids=["all ranks", "rank 1"])
def test_the_watchdog_ends_a_hang_at_any_moment(
    tmp_path: Path, moment: str, phase: str, rank: list[str]
) -> None:
    process = start_ranks(tmp_path, ["sleep", moment, *rank], "run.dir=run", "run.hang_minutes=0.1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_HUNG
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"rank 1 makes no progress in phase {phase} (" in lines[0]
    assert "in <lambda>" in (tmp_path / "run/stacks/rank_00001.txt").read_text()
    assert processes_of(tmp_path) == []


STUB_SRUN = """#!/bin/bash
# Runs the step's command here, as SLURM does on a node, with its output in the step's log.
for word; do case $word in --output=*) log=${word#--output=} ;; esac; done
log=${log/%-%n.log/-0.log}
while [ "$1" != bash ]; do shift; done
"$@" >"${log//%%/%}" 2>&1 &
task=$!
trap 'kill -USR1 "$task"' USR1
wait "$task"
code=$?
while kill -0 "$task" 2>/dev/null; do wait "$task"; code=$?; done
exit "$code"
"""


def start_job(folder: Path, case: list[str], name: str) -> tuple[Job, subprocess.Popen[str]]:
    """The job script with a stub of srun that starts the real ranks, in a project of this name."""
    job = Job(folder)
    (folder / "bin/srun").write_text(STUB_SRUN)
    project = folder / name
    project.mkdir()
    (project / "slurm").symlink_to(ROOT / "slurm")
    python = project / f"{name}.py"
    worker = shlex.join([sys.executable, str(WORKER), json.dumps([case])])
    python.write_text(
        f'#!/bin/bash\n[ "$2 $3" != "opo_megatron preflight" ] || {{ echo exit 0 >&9; exit 0; }}\n'
        f'[ "$2" != opo_megatron ] || {{ shift 2; exec {worker} "$@"; }}\n'
        f'exec {shlex.quote(sys.executable)} "$@"\n'
    )
    python.chmod(0o755)
    job.logs = project / f"logs {name}"
    arguments = [*COMMAND[2:-1], f"run.dir={name}"]
    variables = {"OPO_LOGS": str(job.logs), "OPO_PYTHON": str(python), "OPO_RANKS_PER_NODE": "2"}
    environment = {"SLURM_SUBMIT_DIR": str(project), "SLURM_JOB_ID": str(os.getpid())}
    environment |= {"FAKE_NAME": "127.0.0.", "FAKE_NODES": "1"}
    return job, job.start(str(RECIPE), *arguments, **variables, **environment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "status"),
    [
        (["nothing", "always"], "completed"),
        (["move", "always"], "completed"),
        (["terminate a child", "always"], "completed"),
        (
            ["exit", "step 2", "0"],
            "failed: error: the run ended with exit code 0 before its last step (1 of 3): ",
        ),
        (["leave", "step 2"], "failed: error: rank "),
        (
            ["leave as if saved", "step 2", "1"],
            "failed: error: rank 1 ended with exit code 75 before its last ",
        ),
        (
            ["leave", "evaluation", "0"],
            "failed: error: rank 0 ended with exit code 0 before its last step (0 ",
        ),
    ],
    ids=str,
)
def test_the_status_of_a_job_is_what_its_ranks_did(tmp_path: Path, case: list[str], status: str) -> None:
    name = "jób's $HOME"
    job, process = start_job(tmp_path, case, name)
    output, _ = process.communicate(timeout=200)
    assert (job.logs / "status").read_text().startswith(status), output
    assert process.returncode == (status != "completed")
    project = tmp_path / name
    if status == "completed":
        assert [row["step"] for row in curve(project / name)] == [0, 1, 2, 3]
    assert {path.name for path in project.iterdir()} <= {
        "slurm", name, f"{name}.py", f"logs {name}", "elsewhere"
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_saves_and_is_requeued(tmp_path: Path) -> None:
    job, process = start_job(tmp_path, ["terminate a pool", "always"], "a job")
    log = job.logs / "attempt_0/train-0.log"
    deadline = time.monotonic() + 100
    while not log.exists() or "step 0" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(SIGUSR1)
    process.communicate(timeout=100)
    assert (tmp_path / "status.requeued").read_text() == "preempted\n"
    assert (job.logs / "attempt_0/train.ranks/node0/0.code").read_text() == f"{EXIT_PREEMPTED}\n"
