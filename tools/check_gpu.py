"""Checks and measures everything that needs a GPU: one JSON file, at most five minutes on one card.

    python tools/check_gpu.py                       # all sections → records/gpu.json
    python tools/check_gpu.py --dry-run             # what would run, and for how long at most
    python tools/check_gpu.py --only training       # the sections whose name contains this
    python tools/check_gpu.py --device cpu          # every section as far as a CPU goes; writes no record

Sections that look for faults run side by side, those that measure time run alone, each in a process of its
own with a limit, so that one which fails or hangs does not affect the others.  Exit code 1 where a section
failed, missed a limit or could not run on a GPU, 2 without one.  Sections that need more time than this run
with --only alone.

On a machine whose SGLang is elsewhere, or lacks kernels:

    python tools/check_gpu.py --sglang-python /opt/sglang/bin/python \\
        --sglang-option attention_backend=triton --sglang-option sampling_backend=pytorch
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.gpu_engine import ENGINE_SECTIONS
from bench.gpu_exact import EXACT_SECTIONS
from bench.gpu_experts import EXPERT_SECTIONS
from bench.gpu_kernels import KERNEL_SECTIONS
from bench.gpu_layouts import LAYOUT_SECTIONS
from bench.gpu_libraries import LIBRARY_SECTIONS, versions
from bench.gpu_mismatch import MISMATCH_SECTIONS
from bench.gpu_section import Figures, Section, Setting
from bench.gpu_training import TRAINING_SECTIONS
from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
SECTIONS: list[Section] = [
    *LIBRARY_SECTIONS,
    *ENGINE_SECTIONS,
    *MISMATCH_SECTIONS,
    *LAYOUT_SECTIONS,
    *KERNEL_SECTIONS,
    *TRAINING_SECTIONS,
    *EXPERT_SECTIONS,
    *EXACT_SECTIONS,
]
CPU_PATIENCE = 5
"""A section's limit on a CPU, in limits on a GPU."""
SIDE_BY_SIDE = 15
"""Sections at the same time: as many as look for faults, because they mostly wait for servers to start."""
STOP_SECONDS = 5
LAST_LINES = 15
RESULT, LOG = "result.json", "log"


def main() -> int:
    options = parse_arguments()
    if options.section:
        return run_section(options)
    sections = chosen(options.only)
    if options.dry_run:
        print_plan(sections, options.side_by_side)
        return 0
    if options.device == "cuda" and not sees_gpu():
        print(
            "error: torch sees no GPU; run this on a machine with one, or pass --device cpu", file=sys.stderr
        )
        return 2
    folder = Path(options.keep or tempfile.mkdtemp(prefix="check_gpu_")).resolve()
    started = time.monotonic()
    try:
        results = run_all(sections, options, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{time.monotonic() - started:.0f} s in all")
    if options.device == "cuda":
        found = versions(setting_of(options, folder))
        print(", ".join(f"{name} {found[name]}" for name in ("torch", "megatron-core", "transformer-engine")))
        print(f"written to {write_record('gpu', {'versions': found, 'sections': results})}")
    return conclude(results, options.device == "cuda")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="sections by part of name"
    )
    parser.add_argument("--dry-run", action="store_true", help="print sections and limits, and stop")
    parser.add_argument(
        "--side-by-side", type=int, default=SIDE_BY_SIDE, metavar="N", help="sections at the same time"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep runs and logs in this new folder")
    parser.add_argument("--sglang-python", default=str(ROOT / ".venv-sglang" / "bin" / "python"))
    parser.add_argument(
        "--sglang-option", action="append", default=[], metavar="KEY=VALUE", help="option of every server"
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sglang_python = os.path.abspath(os.path.expanduser(options.sglang_python))
    if options.device == "cpu":
        options.side_by_side = 1  # its sections would only make each other slower
    if options.keep and options.keep.exists() and any(options.keep.iterdir()):
        parser.error(f"--keep {options.keep} is not empty; name a new folder")
    if options.only and not chosen(options.only):
        parser.error(f"--only {options.only[0]} is no part of: {', '.join(s.name for s in SECTIONS)}")
    return options


def chosen(only: Sequence[str]) -> list[Section]:
    """The sections whose names contain one of `only`; without it, those that run by default."""
    if not only:
        return [section for section in SECTIONS if section.by_default]
    parts = [part.lower() for part in only]
    return [section for section in SECTIONS if any(part in section.name.lower() for part in parts)]


def setting_of(options: argparse.Namespace, folder: Path) -> Setting:
    return Setting(options.device, folder, options.sglang_python, tuple(options.sglang_option))


def sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ---------------------------------------------------------------------- the plan


def longest(sections: Sequence[Section], workers: int) -> int:
    """Upper bound of the seconds: side by side in the order of `in_order`, then one by one."""
    busy = [0] * workers
    for section in in_order(sections, alone=False):
        busy[busy.index(min(busy))] += section.seconds
    return max(busy) + sum(section.seconds for section in in_order(sections, alone=True))


def in_order(sections: Sequence[Section], alone: bool) -> list[Section]:
    """Those that run alone, or side by side: the longest first, so that workers end together."""
    return sorted((s for s in sections if s.alone is alone), key=lambda s: 0 if alone else -s.seconds)


def print_plan(sections: Sequence[Section], workers: int) -> None:
    for alone, heading in (
        (False, f"side by side, {workers} at a time"),
        (True, "alone, one after the other"),
    ):
        print(heading)
        for section in in_order(sections, alone):
            print(f"  {section.seconds:4d} s  {section.name}")
    print(f"{longest(sections, workers)} s at most")
    by_name = [section.name for section in SECTIONS if not section.by_default]
    if by_name:
        print(f"with --only alone: {', '.join(by_name)}")


# ---------------------------------------------------------------------- running


def run_all(sections: Sequence[Section], options: argparse.Namespace, folder: Path) -> dict[str, Figures]:
    """Every section's result by name, in the order of `sections`."""
    results: dict[str, Figures] = {}
    lock, started = threading.Lock(), time.monotonic()

    def run(section: Section) -> None:
        result = in_subprocess(section, options, folder / section.name.replace(": ", "_").replace(" ", "_"))
        with lock:
            results[section.name] = result
            print(line_of(section.name, result, time.monotonic() - started), flush=True)

    with ThreadPoolExecutor(options.side_by_side) as pool:
        list(pool.map(run, in_order(sections, alone=False)))
    for section in in_order(sections, alone=True):
        run(section)
    return {section.name: results[section.name] for section in sections}


def in_subprocess(section: Section, options: argparse.Namespace, folder: Path) -> Figures:
    """The section in a process group of its own, which is killed at its limit."""
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        os.path.abspath(sys.argv[0]),
        "--section",
        section.name,
        "--folder",
        str(folder),
    ]
    command += ["--device", options.device, "--sglang-python", options.sglang_python]
    command += [word for option in options.sglang_option for word in ("--sglang-option", option)]
    limit = section.seconds * (CPU_PATIENCE if options.device == "cpu" else 1)
    started = time.monotonic()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"it took longer than {limit} seconds"
        finally:
            end_group(process)
    seconds = {"seconds": round(time.monotonic() - started, 1)}
    if code == 0 and (folder / RESULT).exists():
        result: Figures = json.loads((folder / RESULT).read_text())
        return result | seconds
    lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
    failed = code if isinstance(code, str) else (lines[-1] if lines else f"exit code {code}")
    return {"failed": failed, "last lines": lines[-LAST_LINES:]} | seconds


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a section left running; its runs stop their servers when they are told to end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            if number == signal.SIGTERM:
                time.sleep(0.2)  # its children handle theirs


def run_section(options: argparse.Namespace) -> int:
    """In the section's own process: write its result, or print it where no folder is given."""
    section = next(section for section in SECTIONS if section.name == options.section)
    with tempfile.TemporaryDirectory() as scratch:
        result = json.dumps(section.run(setting_of(options, options.folder or Path(scratch))))
    if options.folder is None:
        print(result)
    else:
        (options.folder / RESULT).write_text(result)
    return 0


# ---------------------------------------------------------------------- results


def line_of(name: str, result: Figures, now: float) -> str:
    """One line: when it ended, what came out, the figures that are numbers."""
    if "failed" in result:
        return f"{now:6.1f} s  FAILED   {name}: {result['failed']}"
    if "missing" in result:
        return f"{now:6.1f} s  not run  {name}: {result['missing']}"
    figures = ", ".join(
        f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, int | float)
    )
    return f"{now:6.1f} s  {'NOT MET' if 'not met' in result else 'ok':7}  {name}: {figures}"


def conclude(results: dict[str, Any], on_gpu: bool) -> int:
    """Print what is missed; the exit code.  On a GPU, what was not run is not proven, so it is missed too."""
    failed = {name: result["failed"] for name, result in results.items() if "failed" in result}
    missed = {name: result["not met"] for name, result in results.items() if "not met" in result}
    for name, reason in failed.items():
        print(f"FAILED: {name}: {reason}")
    for name, lines in missed.items():
        print(f"NOT MET: {name}: {'; '.join(lines)}")
    not_run = {name: result["missing"] for name, result in results.items() if on_gpu and "missing" in result}
    for name, reason in not_run.items():
        print(f"NOT RUN: {name}: {reason}")
    return 1 if failed or missed or not_run else 0


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
