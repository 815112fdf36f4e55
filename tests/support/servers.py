"""Shared by tests with a real SGLang server."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT


def sglang_python() -> str:
    """Python interpreter of SGLang's environment; skips or fails without it, as `requirements.require`."""
    python = Path(os.environ.get("OPO_SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not python.exists():
        reason = f"{python} does not exist; make SGLang's environment with: make setup-sglang"
        if os.environ.get("OPO_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return str(python)


def processes_of(run_dir: Path) -> list[int]:
    """Live processes in the process groups of the run's servers, by their pid files."""
    groups = {int(path.read_text()) for path in run_dir.rglob("*.pid")}
    assert groups, f"no server was started in {run_dir}"
    alive_pids = []
    for process in psutil.process_iter(["status"]):
        try:
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and os.getpgid(process.pid) in groups:
                alive_pids.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return alive_pids
