"""The batch scripts on a real one-node SLURM, with a CPU recipe: two ranks, real signals."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, running, variables

TINY = (
    "recipes/quickstart.yaml", "warm_start.steps=80", "eval.problems=32",
    "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "eval.every_steps=0",
    "checkpoint.every_steps=0", "optimizer.lr=1e-4", "observe.kl=off", "observe.tensorboard=false",
)  # fmt: skip
UNSTABLE = ("time/", "memory/", "throughput/", "run/")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def train_through(cluster: Cluster, run: Path, *overrides: str) -> list[dict]:
    """The rows of an uninterrupted run."""
    job = cluster.submit(
        "--time=20", "slurm/opo_70b.sh", *TINY, *overrides, f"run.dir={run}",
        variables=variables(run.with_suffix(".job")),
    )  # fmt: skip
    assert cluster.wait(job, 600) == "COMPLETED"
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(UNSTABLE)} for row in rows]


def test_slurm_accepts_the_job(cluster: Cluster) -> None:
    result = cluster.attempt("sbatch", "--test-only", "--nodes=1", "--gpus-per-node=0", "slurm/opo_70b.sh")
    assert result.returncode == 0 and "to start at" in result.stderr, result.stderr
    result = cluster.attempt("sbatch", "--test-only", "--gpus-per-node=0", "slurm/opo_70b.sh")
    assert result.returncode != 0, "needs eight nodes, the cluster has one"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_requeued_job_ends_with_the_curve_of_an_uninterrupted_one(cluster: Cluster, tmp_path: Path) -> None:
    uninterrupted, requeued = tmp_path / "uninterrupted", tmp_path / "requeued"
    measured = train_through(cluster, tmp_path / "measured", "train.steps=40")
    # Long enough that the signal, 45 to 75 seconds before the end of three minutes, arrives during training.
    steps = round(150 / statistics.median(row["time/step"] for row in measured[1:]))
    train_through(cluster, uninterrupted, f"train.steps={steps}")
    logs = variables(requeued.with_suffix(".job"))
    job = cluster.submit(
        "--time=3",
        "--signal=B:USR1@45",
        "slurm/opo_70b.sh",
        *TINY,
        f"train.steps={steps}",
        f"run.dir={requeued}",
        variables=logs,
    )
    assert cluster.wait(job, 900) == "COMPLETED"
    folder = Path(logs["OPO_LOGS"])
    assert (folder / "status").read_text() == "completed\n"
    output = Path(f"{folder}.out").read_text()
    assert "attempt 0: preempted" in output and "completed" in output.splitlines()[-1]
    assert len(list(folder.glob("attempt_*"))) > 1
    assert curve(requeued) == curve(uninterrupted)
    assert sum(row.get("grad_norm", 0) > 0 for row in curve(uninterrupted)) > 20, (
        "training must have gradients"
    )


@pytest.mark.slow
def test_a_preflight_failure_stops_before_a_model_is_loaded(cluster: Cluster, tmp_path: Path) -> None:
    logs = variables(tmp_path, OPO_MIN_FREE_DISK_GB="1e9")
    started = time.monotonic()
    job = cluster.submit("slurm/opo_70b.sh", *TINY, f"run.dir={tmp_path}/run", variables=logs)
    assert cluster.wait(job, 120) == "FAILED"
    assert time.monotonic() - started < 90
    status = (tmp_path / "logs/status").read_text()
    assert status.startswith("failed: preflight: error: ") and "below 1e+09 GB; free space" in status
    assert not list((tmp_path / "logs").rglob("train*")) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_restarts_are_capped(cluster: Cluster, tmp_path: Path) -> None:
    logs = variables(tmp_path, OPO_MAX_RESTARTS="1")
    job = cluster.submit(
        "--time=30",
        "slurm/opo_70b.sh",
        *TINY,
        "train.steps=100000",
        f"run.dir={tmp_path}/run",
        variables=logs,
    )
    for attempt in range(2):
        log = tmp_path / "logs" / f"attempt_{attempt}" / "train-0.log"
        _wait_until(lambda log=log: log.exists() and "  reward " in log.read_text(), 180)
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        _wait_until(lambda: cluster.state(job) != "RUNNING", 60)
        cluster.attempt("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert cluster.wait(job, 120) == "FAILED"
    status = (tmp_path / "logs/status").read_text()
    assert status == "failed: preempted, after 1 restarts, as many as OPO_MAX_RESTARTS=1 allows\n"
    assert not (tmp_path / "logs/attempt_2").exists()


@pytest.mark.slow
def test_a_hung_job_is_restarted_up_to_the_cap(cluster: Cluster, tmp_path: Path) -> None:
    """Nothing can make progress in 60 ms, so every attempt hangs."""
    logs = variables(tmp_path, OPO_MAX_RESTARTS="1")
    arguments = (*TINY, "run.hang_minutes=0.001", f"run.dir={tmp_path}/run")
    job = cluster.submit("--time=30", "slurm/opo_70b.sh", *arguments, variables=logs)
    _wait_until(lambda: (tmp_path / "logs/attempt_0").exists() and cluster.state(job) != "RUNNING", 180)
    cluster.attempt("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert cluster.wait(job, 180) == "FAILED"
    status = (tmp_path / "logs/status").read_text()
    assert status.startswith("failed: preempted: hung; error: ") and "after 1 restarts" in status
    assert (tmp_path / "logs/attempt_1").exists() and not (tmp_path / "logs/attempt_2").exists()


def _wait_until(condition, seconds: float) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.5)
