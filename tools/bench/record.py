"""Writes a record: the results of a benchmark or comparison, with the command, versions and machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[2] / "records"
PACKAGES = ("torch", "megatron-core", "transformers", "omegaconf", "numpy")


def write_record(name: str, results: dict[str, Any], folder: Path = RECORDS) -> Path:
    """Write `<folder>/<name>.json` for the running command; returns its path."""
    record = {
        "command": shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | _versions(),
        "results": results,
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def _commit() -> str:
    """The current commit, marked where files other than records have changed."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!records")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return commit + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RECORDS.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _machine() -> str:
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{model}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
