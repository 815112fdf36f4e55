"""What tests of a real SGLang server share."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent


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
    """Processes whose command line names the run's folder: servers, and what they started."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(run_dir) in word for word in words):
            found.append(process.info["pid"])
    return [pid for pid in found if pid != os.getpid()]
