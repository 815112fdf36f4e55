"""What tests of a real SGLang server share."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.support.paths import ROOT


def sglang_python() -> str:
    """Interpreter of SGLang's environment, or a skip that says how it is made; see `conftest.require`."""
    python = Path(os.environ.get("OPO_SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not python.exists():
        reason = f"{python} does not exist; make SGLang's environment with: make setup-sglang"
        if os.environ.get("OPO_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return str(python)


def processes_of(run_dir: Path) -> list[int]:
    """What is left of the process groups of the run's servers, by the files that name them."""
    groups = {int(path.read_text()) for path in run_dir.rglob("*.pid")}
    assert groups, f"no server was started in {run_dir}"
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and os.getpgid(process.pid) in groups:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
