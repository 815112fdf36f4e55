"""A real one-node SLURM cluster on this machine: own configuration, sockets, state; stopped by process id."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.requirements import program

PROGRAMS = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged")
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
MinJobAge=3600
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE
"""
"""MinJobAge lets tests query finished jobs."""


class Cluster:
    """Client of the cluster."""

    def __init__(self, configuration: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(configuration)}

    def run(self, *command: str, **variables: str) -> str:
        """The output of a SLURM command; it must succeed."""
        result = self.attempt(*command, **variables)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def attempt(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **variables}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT, check=False
        )

    def submit(self, *arguments: str, variables: Mapping[str, str]) -> str:
        """Submits slurm/opo_70b.sh with options for a CPU; returns the job id."""
        Path(variables["OPO_LOGS"]).parent.mkdir(parents=True, exist_ok=True)
        options = ["--parsable", "--nodes=1", "--gpus-per-node=0", f"--output={variables['OPO_LOGS']}.out"]
        return self.run("sbatch", *options, *arguments, **variables).strip()

    def state(self, job: str) -> str:
        output = self.run("scontrol", "show", "job", job)
        return output.partition("JobState=")[2].split()[0]

    def wait(self, job: str, seconds: float) -> str:
        """The job's final state."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (state := self.state(job)) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
                return state
            if state == "PENDING":  # SLURM delays a requeued job by two minutes
                self.attempt("scontrol", "update", f"JobId={job}", "StartTime=now")
            time.sleep(1)
        self.run("scancel", job)
        raise AssertionError(f"job {job} is {state} after {seconds} s")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster in `folder`; skips the test where a program is missing."""
    for name in PROGRAMS:
        program(name, "make setup-system")
    if os.geteuid() != 0:
        pytest.skip("starting a SLURM cluster needs root")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    ports = _two_free_ports()
    configuration.write_text(
        CONFIGURATION.format(
            host=host, port=ports[0], node_port=ports[1], folder=folder, cpus=len(os.sched_getaffinity(0))
        )
    )
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            with (folder / f"{command[0]}.out").open("wb") as log:
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        cluster = Cluster(configuration)
        _wait_until_idle(cluster, folder)
        try:
            yield cluster
        finally:  # jobs outlive the daemons
            for job in cluster.attempt("squeue", "--noheader", "--format=%A").stdout.split():
                cluster.attempt("scancel", job)
                cluster.wait(job, 60)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _wait_until_idle(cluster: Cluster, folder: Path) -> None:
    for _ in range(60):
        output = cluster.attempt("sinfo", "--noheader", "--format=%T")
        if output.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.out")))
    raise AssertionError(f"SLURM did not start: {output.stdout}{output.stderr}\n{logs}")


def _two_free_ports() -> list[int]:
    with socket.socket() as one, socket.socket() as two:
        for endpoint in (one, two):
            endpoint.bind(("127.0.0.1", 0))
        return [endpoint.getsockname()[1] for endpoint in (one, two)]


def variables(folder: Path, **more: str) -> dict[str, str]:
    """Environment of a job on this machine: two ranks, this interpreter, logs in `folder`."""
    return {
        "OPO_RANKS_PER_NODE": "2",
        "OPO_PYTHON": sys.executable,
        "OPO_LOGS": str(folder / "logs"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    } | more
