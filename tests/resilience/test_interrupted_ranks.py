"""When one rank is interrupted all ranks end, and the resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM, SIGUSR1
from typing import Any

import pytest

from opo_megatron.errors import EXIT_HUNG, EXIT_PREEMPTED
from tests.support.fixtures import RECIPE
from tests.support.interrupted import COMMAND, INTERRUPTED_RUN, assert_same_run
from tests.support.tiny_run import lasting, rows

TP2 = "policy.tensor_model_parallel_size=2"
CP2 = ("policy.packing=thd", "policy.context_parallel_size=2")
CLIPPED = ("algorithm.objective=clipped", "algorithm.updates_per_batch=2", "algorithm.kl_coefficient=0.1")
LAUNCH = "from opo_megatron.distributed.launch import run_ranks; import sys; n, *command = sys.argv[1:]; "
LAUNCH += "sys.exit(run_ranks(command, int(n)))"


def attempt(run_dir: Path, nproc: int, schedule: list[Any] | None, *overrides: str) -> int:
    """The launcher's exit code."""
    result = start(run_dir, nproc, schedule, *overrides)
    assert result.returncode in (0, EXIT_PREEMPTED, 128 + SIGKILL), result.stderr
    return result.returncode


def start(
    run_dir: Path, nproc: int, schedule: list[Any] | None, *overrides: str
) -> subprocess.CompletedProcess[str]:
    arguments = ["train", str(RECIPE), f"run.dir={run_dir}", *COMMAND, *overrides]
    command = [sys.executable, str(INTERRUPTED_RUN), json.dumps([schedule]), *arguments]
    launcher = [sys.executable, "-c", LAUNCH, str(nproc), *command]
    return subprocess.run(launcher, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_ranks_interrupted_in_every_phase_equal_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    assert attempt(uninterrupted, 4, None, TP2) == 0
    schedules = (
        (["warm start", int(SIGKILL), 3], 128 + SIGKILL),
        (["generation", int(SIGUSR1), 2], EXIT_PREEMPTED),
        (["training", int(SIGTERM), 3], EXIT_PREEMPTED),
        (["evaluation", int(SIGKILL), 1], 128 + SIGKILL),
        (["writing", int(SIGKILL), 3], 128 + SIGKILL),
        (["saving", int(SIGKILL), 0], 128 + SIGKILL),
    )
    for schedule, code in schedules:
        assert attempt(interrupted, 4, schedule, TP2) == code, schedule
    assert attempt(interrupted, 4, None, TP2) == 0
    assert_same_run(interrupted, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("layout", "recipe"), [((TP2,), ()), (CP2, ()), (CP2, CLIPPED)], ids=["tensor", "context", "clipped"]
)
def test_a_run_resumes_under_another_layout_up_to_rounding(
    tmp_path: Path, layout: tuple[str, ...], recipe: tuple[str, ...]
) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    assert attempt(uninterrupted, 1, None, *recipe) == 0
    assert attempt(interrupted, 2, ["training", int(SIGTERM), 1], *layout, *recipe) == EXIT_PREEMPTED
    assert attempt(interrupted, 1, None, *recipe) == 0
    assert [row["run/attempt"] for row in rows(interrupted)] == [1, 1, 2, 2, 2, 2, 2]
    for name in ("metrics.jsonl", "warm_start.jsonl"):
        for row, expected in zip(lasting(interrupted, name), lasting(uninterrupted, name), strict=True):
            assert row.keys() == expected.keys()
            for key in expected.keys() & {"loss", "grad_norm", "reward/mean", "eval/accuracy", "entropy"}:
                target = pytest.approx(expected[key], rel=1e-3, abs=1e-6)
                assert row[key] == target, (row["step"], key)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stopped", "responsive"), [(1, 0), (0, 1)])
def test_a_stopped_rank_is_named_with_its_phase_and_all_stacks(
    tmp_path: Path, stopped: int, responsive: int
) -> None:
    minutes = 0.2
    interrupted = tmp_path / "interrupted"
    result = start(interrupted, 2, ["training", int(SIGSTOP), stopped], TP2, f"run.hang_minutes={minutes}")
    assert result.returncode == EXIT_HUNG, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert f"rank {stopped} is stopped or gone in phase train of step 1 (process " in lines[0]
    assert f"rank {responsive} " not in lines[0]
    hang_seconds = float(lines[0].split("has hung for ")[1].split(" s")[0])
    assert 60 * minutes <= hang_seconds < 2 * 60 * minutes
    stacks = [(interrupted / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in (0, 1)]
    assert all("in opo_step" in one and "in train_step" in one for one in stacks)
    assert "in interrupted" in stacks[stopped], "the stack shows where it was stopped"
    assert attempt(interrupted, 2, None, TP2) == 0
