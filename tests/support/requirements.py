"""Optional requirements of tests, and launching workers as ranks."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


def require(module: str, command: str) -> ModuleType:
    """Import `module`, or skip naming the command that installs it; with OPO_REQUIRE_ALL=1 fail instead."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{module} is missing ({error}); install it with: {command}"
        if os.environ.get("OPO_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def run_ranks_of(script: Path, nproc: int, *arguments: str, timeout: float = 240) -> None:
    """Run a worker script as `nproc` rank processes, which are killed at the timeout.

    The launcher runs in a child process: killing it kills the ranks.
    """
    launch = "from opo_megatron.distributed.launch import run_ranks; import sys; n, *command = sys.argv[1:]"
    launch += "; sys.exit(run_ranks(command, int(n)))"
    command = [sys.executable, "-c", launch, str(nproc), sys.executable, str(script), *arguments]
    result = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{script.name} failed:\n{result.stdout}\n{result.stderr}"


def program(name: str, command: str) -> Path:
    """Path of a program of this environment or of the machine; where it is missing, as `require`."""
    path = shutil.which(name, path=f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        reason = f"{name} is missing; install it with: {command}"
        if os.environ.get("OPO_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(path)
