"""Ranks of which one is struck end together, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1
from typing import Any

import pytest
from small import RECIPE
from test_never_lost import COMMAND, STRUCK_RUN, assert_same_run
from tiny_run import lasting, rows

from opo_megatron.errors import EXIT_PREEMPTED

TP2 = "policy.tensor_model_parallel_size=2"
LAUNCH = "from opo_megatron.launch import run_ranks; import sys; n, *command = sys.argv[1:]; "
LAUNCH += "sys.exit(run_ranks(command, int(n)))"


def attempt(run_dir: Path, nproc: int, plan: list[Any] | None, *overrides: str) -> int:
    """The launcher's exit code."""
    arguments = ["train", str(RECIPE), f"run.dir={run_dir}", *COMMAND, *overrides]
    command = [sys.executable, str(STRUCK_RUN), json.dumps([plan]), *arguments]
    line = [sys.executable, "-c", LAUNCH, str(nproc), *command]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, EXIT_PREEMPTED, 128 + SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_ranks_of_which_one_is_struck_in_every_phase_go_on_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    assert attempt(calm, 4, None, TP2) == 0
    plans = (
        (["warm start", int(SIGKILL), 3], 128 + SIGKILL),
        (["generation", int(SIGUSR1), 2], EXIT_PREEMPTED),
        (["training", int(SIGTERM), 3], EXIT_PREEMPTED),
        (["evaluation", int(SIGKILL), 1], 128 + SIGKILL),
        (["saving", int(SIGKILL), 0], 128 + SIGKILL),
    )
    for plan, code in plans:
        assert attempt(struck, 4, plan, TP2) == code, plan
    assert attempt(struck, 4, None, TP2) == 0
    assert_same_run(struck, calm)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_under_another_layout_within_rounding(tmp_path: Path) -> None:
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    assert attempt(calm, 1, None) == 0
    assert attempt(struck, 2, ["training", int(SIGTERM), 1], TP2) == EXIT_PREEMPTED
    assert attempt(struck, 1, None) == 0
    assert [row["run/attempt"] for row in rows(struck)] == [1, 1, 2, 2, 2, 2, 2]
    for name in ("metrics.jsonl", "warm_start.jsonl"):
        for row, expected in zip(lasting(struck, name), lasting(calm, name), strict=True):
            assert row.keys() == expected.keys()
            for key in expected.keys() & {"loss", "grad_norm", "reward/mean", "eval/accuracy", "entropy"}:
                close = pytest.approx(expected[key], rel=1e-3, abs=1e-6)
                assert row[key] == close, (row["step"], key)
