"""Ends grading workers together with every process that a grader started.

A worker is a guardian (`grading_worker.py`), which kills what its child leaves behind.  Where a grader
killed the guardian itself, its processes are found by a mark in their environment."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MARK = "OPO_GRADING_WORKER"
"""Environment variable that all processes of a pool's workers have."""
PATIENCE_SECONDS = 2.0


def kill_worker(process: subprocess.Popen[bytes]) -> bool:
    """End a worker; whether its guardian has cleaned up."""
    process.send_signal(signal.SIGTERM)
    try:
        is_clean = process.wait(PATIENCE_SECONDS) >= 0
    except subprocess.TimeoutExpired:
        is_clean = False
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session: the process group that it leads
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    return is_clean


def kill_marked(mark: str, but: Sequence[int] = ()) -> None:
    """Kill the processes of this user with a pool's mark, except those below the guardians in `but`."""
    entry = f"{MARK}={mark}".encode()
    kept = set(but)
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                pid = int(folder.name)
                if pid not in kept and not kept.intersection(_ancestors(pid)):
                    os.kill(pid, signal.SIGKILL)


def _ancestors(pid: int) -> list[int]:
    found: list[int] = []
    while pid > 1:
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(")")[2].split()[1])
            found.append(pid)
            continue
        break
    return found
