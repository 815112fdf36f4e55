"""The batch scripts without a cluster: `srun`, `curl` and `scontrol` are fakes, the rest is real."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opo_megatron.config import load_config
from tests.support.cluster import PROGRAMS, ROOT
from tests.support.paths import RECIPES
from tests.support.requirements import program
from tests.support.slurm_job import NAMES, Job

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = program("shellcheck", "pip install 'opo-megatron[dev]'")
    result = subprocess.run([shellcheck, "-x", f"slurm/{script.name}"], cwd=ROOT, capture_output=True)
    assert result.returncode == 0, result.stdout.decode()


def test_the_scripts_are_short_and_print_no_environment() -> None:
    text = {path.name: path.read_text() for path in SCRIPTS}
    assert sum(len(text[name].splitlines()) for name in ("opo_70b.sh", "common.sh")) < 180
    for name, lines in text.items():
        for line in lines.splitlines():
            code = line.split("#")[0].split()
            assert "set -x" not in line and "env" not in code and "printenv" not in code, name
            assert "pkill" not in code and "killall" not in code, name


def test_setup_system_checks_every_program_that_tests_need() -> None:
    match = re.search(r"^SYSTEM_PROGRAMS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert match is not None and set(match[1].split()) == {*PROGRAMS, "chromium"}


def test_a_job_outside_the_project_is_rejected(tmp_path: Path) -> None:
    environment = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)}
    result = subprocess.run(
        ["bash", str(ROOT / "slurm/opo_70b.sh")], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2 and "submit from the project's folder" in result.stderr


def test_preflight_then_training_on_all_nodes_with_one_task_each(job: Job) -> None:
    code, status = job.run("recipes/quickstart.yaml", "run.seed=2", FAKE_NODES="1 2")
    assert (code, status) == (0, "completed")
    preflight, train = job.calls
    assert preflight.endswith(
        "bash slurm/node.sh opo_megatron preflight recipes/quickstart.yaml resume=auto run.seed=2"
    )
    assert train.endswith(
        "bash slurm/node.sh opo_megatron train recipes/quickstart.yaml resume=auto run.seed=2"
    )
    for call in job.calls:
        assert "--nodelist=node1,node2 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=16" in call
    assert f"--output={job.logs}/attempt_0/train-%n.log" in train
    assert "running" in job.output and "completed" in job.output


def test_a_failed_preflight_stops_the_job_with_its_reason(job: Job) -> None:
    job.set_result("preflight", "noise\nerror: node7: GPU 3 counts 2 uncorrected ECC errors\nmore", 2)
    code, status = job.run()
    assert code == 1
    assert status.startswith("failed: preflight: error: node7: GPU 3 counts 2 uncorrected ECC errors; see ")
    assert len(job.calls) == 1


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [
        ("error: run.dir is full\n", 2, "failed: error: run.dir is full; see "),
        ("Traceback\nValueError: no\n", 1, "failed: ValueError: no; see "),
        ("nothing to see", 7, "failed: exit code 7 without a message; see "),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried\n", 1, "oom: torch.OutOfMemoryError: CUDA out"),
        ("Killed\n", 137, "oom: exit code 137"),
        ("slurmstepd: error: Detected 1 oom_kill event\n", 9, "oom: "),
    ],
)
def test_every_outcome_has_its_status(job: Job, output: str, code: int, status: str) -> None:
    job.set_result("train", output, code)
    assert job.run()[0] == 1
    assert (job.logs / "status").read_text().startswith(status)


@pytest.mark.parametrize(
    ("outcome", "reached"),
    [
        ("its last step (17 of 60)", "its last step (17 of 60)"),
        ("the end of `opo train`", "the end of `opo train`"),
        ("exit 75", "exit 75"),
        ("exit 1", "exit 1"),
        ("", "its start"),
        ("its last step (60 of 60)\nexit 0", "its last step (60 of 60)"),
    ],
)
def test_a_job_is_completed_by_what_rank_0_wrote_and_by_no_exit_code(
    job: Job, outcome: str, reached: str
) -> None:
    (job.folder / "train.outcome").write_text(outcome)
    earlier = job.logs / "attempt_0/train.ranks/node0"  # which does not count
    earlier.mkdir(parents=True)
    (earlier / "0.outcome").write_text("exit 0\n")
    code, status = job.run(SLURM_RESTART_COUNT="1")
    assert code == 1 and status == f"failed: exit code 0 before {reached}; see {job.logs}/attempt_1"


def test_a_preflight_that_did_not_come_to_its_end_stops_the_job(job: Job) -> None:
    (job.folder / "preflight.outcome").write_text("the end of `opo preflight`")
    code, status = job.run()
    assert code == 1 and status.startswith("failed: preflight: ") and len(job.calls) == 1


RANKS = {
    "came to its end": ("echo exit 0 >&9; exit 0", 0, "0", None),
    "saved": ("echo exit 75 >&9; exit 75", 0, "75", None),
    "hung": ("echo exit 76 >&9; exit 76", 76, "76", None),
    "an error in one line": ("echo exit 2 >&9; exit 2", 2, "2", None),
    "a traceback": ("echo 'its last step (1 of 2)' >&9; exit 1", 1, "1", None),
    "killed": ("kill -KILL $BASHPID", 137, "137", None),
    "exit 0 early": ("echo 'its last step (1 of 2)' >&9; exit 0", 1, "1", "0 before its last step (1 of 2)"),
    "exit 0 at once": ("exit 0", 1, "1", "0 before its start"),
    "pretends to have saved": ("echo 'its last step (1 of 2)' >&9; exit 75", 1, "1", "75 before its last"),
    "pretends to hang": ("exit 76", 1, "1", "76 before its start"),
    "fails in silence": ("exit 7", 1, "1", "7 before its start"),
    "changes its code": ("echo exit 0 >&9; exit 3", 1, "1", "3 before exit 0"),
}


@pytest.mark.parametrize(("command", "code", "written", "error"), RANKS.values(), ids=RANKS)
def test_a_rank_of_a_job_ends_with_the_code_that_it_wrote(
    tmp_path: Path, command: str, code: int, written: str, error: str | None
) -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "slurm/rank.sh"), str(tmp_path), "bash", "-c", command],
        env={**os.environ, "RANK": "3"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == code and (tmp_path / "3.code").read_text() == f"{written}\n"
    if error is None:
        assert "error: " not in result.stderr
    else:
        assert f"error: rank 3 ended with exit code {error}" in result.stderr


@pytest.fixture(params=NAMES.values(), ids=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """A name that a folder may have."""
    return str(request.param)


@pytest.mark.parametrize("engines", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_any_name_of_a_folder_reaches_every_program_unchanged(job: Job, name: str, engines: int) -> None:
    project = job.folder / name
    (project / "slurm").parent.mkdir()
    (project / "slurm").symlink_to(ROOT / "slurm")
    job.logs = project / name
    (job.folder / "engine.waits").touch()
    arguments = (f"recipes/{name}.yaml", f"run.dir={name}/{name}", f"task.data={name}")
    variables = {"FAKE_NODES": "1 2", "OPO_ENGINE_NODES": str(engines), "OPO_PYTHON": f"{project}/bin/python"}
    code, status = job.run(*arguments, SLURM_SUBMIT_DIR=str(project), OPO_LOGS=name, **variables)
    assert (code, status) == (0, "completed")
    words = [call.split("\n") for call in (job.folder / "srun.words").read_text().split("\0\n")[:-1]]
    assert len(words) == 2 + engines
    for call in words:
        assert set(arguments) <= set(call), "each argument is one word"
        log = next(word for word in call if word.startswith("--output=")).removeprefix("--output=")
        expanded = log.removesuffix("-%n.log").replace("%%", "%")  # as SLURM does
        assert Path(expanded).parent == job.logs / "attempt_0"


def test_any_name_of_a_folder_works_for_the_ranks(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "python").write_text(
        '#!/bin/bash\n[ "$1" != -m ] || [ "$2" != torch.distributed.run ] || {\n'
        'while [ "$1" != --no-python ]; do shift; done; shift; RANK=0 LOCAL_RANK=0 exec "$@"; }\n'
        f'printf "%s\\n" "$@" >{shlex.quote(str(folder / "words"))}; echo exit 75 >&9; exit 75\n'
    )
    (folder / "python").chmod(0o755)
    environment = {
        "OPO_PYTHON": str(folder / "python"),
        "OPO_RANKS_FOLDER": str(folder / "ranks"),
        "OPO_AGAIN": str(folder / "again"),
        "OPO_NODES": "1", "OPO_RANKS_PER_NODE": "1", "OPO_RENDEZVOUS": "x:1", "OPO_RENDEZVOUS_ID": "x",
    }  # fmt: skip
    words = ["opo_megatron", "train", f"{name}.yaml", f"run.dir={name}"]
    command = ["bash", str(ROOT / "slurm/node.sh"), *words]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False, timeout=30)
    assert (folder / "words").read_text().splitlines() == ["-m", *words]
    assert (folder / "again").read_text() == "75\n"
    assert (folder / "ranks/node0/0.code").read_text() == "75\n"


def test_preempted_ranks_requeue_the_job_up_to_the_cap(job: Job) -> None:
    job.set_result("train", code=75)
    assert job.run(SLURM_RESTART_COUNT="1", OPO_MAX_RESTARTS="2")[1] == "preempted"
    assert (job.folder / "status.requeued").read_text() == "preempted\n"
    (job.folder / "status.requeued").unlink()
    code, status = job.run(SLURM_RESTART_COUNT="2", OPO_MAX_RESTARTS="2")
    assert code == 1 and not (job.folder / "status.requeued").exists()
    assert status == "failed: preempted, after 2 restarts, as many as OPO_MAX_RESTARTS=2 allows"
    assert {path.name for path in job.logs.glob("attempt_*")} == {"attempt_1", "attempt_2"}


def test_hung_ranks_requeue_the_job_up_to_the_cap(job: Job) -> None:
    job.set_result("train", "error: rank 3 hangs in step 7, rollout\n", code=76)
    assert job.run(OPO_MAX_RESTARTS="1")[0] != 1
    status = "preempted: hung; error: rank 3 hangs in step 7, rollout; see "
    assert (job.folder / "status.requeued").read_text().startswith(status)
    (job.folder / "status.requeued").unlink()
    code, status = job.run(SLURM_RESTART_COUNT="1", OPO_MAX_RESTARTS="1")
    assert code == 1 and not (job.folder / "status.requeued").exists()
    assert status.startswith("failed: preempted: hung;") and status.endswith("OPO_MAX_RESTARTS=1 allows")


@pytest.mark.parametrize(
    ("code", "status"), [(75, "preempted"), (0, "completed"), (1, "timeout: the ranks did not save before")]
)
def test_the_signal_before_the_time_limit_is_forwarded(job: Job, code: int, status: str) -> None:
    job.set_result("train", code=code)
    (job.folder / "train.waits").touch()
    process = job.start()
    _wait_until(lambda: (job.folder / "train.waiting").exists())
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert (job.logs / "status").read_text().startswith(status)


def test_a_signal_during_preflight_requeues_without_training(job: Job) -> None:
    job.set_result("preflight", code=0)
    (job.folder / "preflight.waits").touch()
    process = job.start()
    _wait_until(lambda: (job.folder / "preflight.waiting").exists())
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert (job.logs / "status").read_text() == "preempted\n" and len(job.calls) == 1


def test_the_last_nodes_serve_where_engine_nodes_are_set(job: Job) -> None:
    (job.folder / "engine.waits").touch()
    assert job.run(FAKE_NODES="1 2 3", OPO_ENGINE_NODES="1") == (0, "completed")
    preflight, *rest = job.calls
    engine = next(call for call in rest if "opo_megatron serve" in call)
    train = next(call for call in rest if "opo_megatron serve" not in call)
    assert "--nodelist=node3 --nodes=1" in engine and engine.endswith("--port 10123")
    assert "--nodelist=node1,node2 --nodes=2" in train and "--nodelist=node1,node2" in preflight
    assert "rollout.sglang.transport=distributed rollout.sglang.urls=[http://node3:10123]" in train
    assert (job.folder / "curl.arguments").read_text().endswith("http://node3:10123/health\n")


def test_servers_of_a_job_share_a_key_file_and_listen_where_ranks_ask(tmp_path: Path) -> None:
    folder, job = tmp_path, Job(tmp_path)
    job.logs = folder / "Ann's job: β #1"
    getent = folder / "bin" / "getent"
    getent.write_text('#!/bin/bash\n[ "$2" = node3 ] && echo "10.0.0.3 STREAM node3" && exit\nexit 2')
    getent.chmod(0o755)
    (folder / "engine.waits").touch()
    stale = job.logs / "attempt_0" / "engine_key"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier job")
    assert job.run(FAKE_NODES="1 2 3 4", OPO_ENGINE_NODES="2") == (0, "completed")
    engine, train = (
        next(call for call in job.calls if word in call) for word in ("megatron serve", "train ")
    )
    assert "rollout.sglang.urls=[http://10.0.0.3:10123,http://node4:10123]" in train
    assert (folder / "addresses").read_text().split() == ["10.0.0.3", "node4"]
    settings = [call[call.index("rollout.sglang.api_key_file=") :] for call in (engine, train)]
    for setting in settings:
        override = setting[: setting.index(" rollout.sglang.transport")]
        config = load_config(RECIPES / "quickstart_sglang.yaml", ["run.dir=x", override])
        assert config.rollout.sglang.api_key_file == str(stale)
    assert (folder / "stale").read_text() == "" and not stale.exists(), "removed before and after"


@pytest.mark.parametrize(("task", "address"), [("0", "10.0.0.3"), ("1", "node4")])
def test_each_server_of_a_job_listens_at_its_own_address(task: str, address: str, tmp_path: Path) -> None:
    variables = {"OPO_PYTHON": "echo", "OPO_ENGINE_ADDRESSES": "10.0.0.3\nnode4", "SLURM_PROCID": task}
    command = ["bash", "slurm/node.sh", "--alone", "opo_megatron", "serve", "a b.yaml", "--port", "1"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert result.stdout == f"-m opo_megatron serve a b.yaml --port 1 --host {address}\n", result.stderr


def test_servers_that_do_not_start_fail_the_job(job: Job) -> None:
    job.set_result("engine", "error: rollout.engine is local\n", 2)
    code, status = job.run(FAKE_NODES="1 2", OPO_ENGINE_NODES="1")
    assert code == 1 and status.startswith("failed: error: rollout.engine is local")
    assert not any("opo_megatron train" in call for call in job.calls)


def test_containers_of_pyxis_and_apptainer(job: Job) -> None:
    job.run(OPO_CONTAINER="pyxis:/images/opo.sqsh")
    assert f"--container-image=/images/opo.sqsh --container-mounts={ROOT}:{ROOT}" in job.calls[0]
    job.run(OPO_CONTAINER="apptainer:/images/opo.sif")
    assert "--container" not in job.calls[-1]


def test_secrets_are_not_printed(job: Job) -> None:
    secret = "hunter2-of-the-test"
    job.run(WANDB_API_KEY=secret, HF_TOKEN=secret, OPO_SGLANG_KEY=secret)
    files = [path for path in job.folder.rglob("*") if path.is_file()]
    assert secret not in job.output + "".join(path.read_text() for path in files)


RANK = """
import os, signal, sys, time
folder = sys.argv[1]
name = os.path.join(folder, "rank" + os.environ["RANK"])
def on_signal(number, frame):
    open(name + ".signal", "a").write(signal.Signals(number).name)
    time.sleep(0.3 * int(os.environ["RANK"]))  # not all at once
    os.write(int(os.environ["OPO_OUTCOME_FD"]), b"exit 75")
    sys.exit(75)
signal.signal(signal.SIGUSR1, on_signal)
open(name + ".ready", "w").write(str(os.getppid()))
while True:
    time.sleep(0.05)
"""


@pytest.mark.parametrize("whole_group", [False, True])
def test_the_signal_reaches_the_ranks_and_not_torchrun(tmp_path: Path, whole_group: bool) -> None:
    """With cgroups SLURM signals the task alone, with other plugins every process of the step."""
    (tmp_path / "a_rank.py").write_text(RANK)
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "OPO_PYTHON": sys.executable,
        "OPO_RANKS_PER_NODE": "2",
        "OPO_NODES": "1",
        "OPO_RENDEZVOUS": f"127.0.0.1:{29500 + os.getpid() % 1000}",
        "OPO_RENDEZVOUS_ID": "test",
        "OPO_AGAIN": str(tmp_path / "again"),
        "OPO_RANKS_FOLDER": str(tmp_path / "ranks"),
    }
    process = subprocess.Popen(
        ["bash", "slurm/node.sh", "a_rank", str(tmp_path)],
        cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait_until(lambda: len(list(tmp_path.glob("*.ready"))) == 2, 60)
        if whole_group:
            os.killpg(process.pid, signal.SIGUSR1)
        else:
            process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0 and (tmp_path / "again").read_text() == "75\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert [path.read_text() for path in sorted(tmp_path.glob("*.signal"))] == ["SIGUSR1", "SIGUSR1"]


def _wait_until(condition, seconds: float = 15) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
