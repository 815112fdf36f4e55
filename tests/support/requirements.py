"""What tests share: parts that may be missing, and ranks that are started once per file."""

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
    """Import `module`, or skip and say which command installs it; with OPO_REQUIRE_ALL=1 fail instead."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{module} is missing ({error}); install it with: {command}"
        if os.environ.get("OPO_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def run_ranks_of(script: Path, nproc: int, *arguments: str, timeout: float = 240) -> None:
    """Run a worker script as `nproc` ranks in processes of their own; they end with the time-out.

    The launcher runs in a child process: killing it takes the ranks along.
    """
    launch = "from opo_megatron.distributed.launch import run_ranks; import sys; n, *command = sys.argv[1:]"
    launch += "; sys.exit(run_ranks(command, int(n)))"
    command = [sys.executable, "-c", launch, str(nproc), sys.executable, str(script), *arguments]
    done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script.name} failed:\n{done.stdout}\n{done.stderr}"


def program(name: str, command: str) -> Path:
    """A program of this environment, or of the machine; without it the test is skipped, as by `require`."""
    found = shutil.which(name, path=f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        reason = f"{name} is missing; install it with: {command}"
        if os.environ.get("OPO_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found)
