"""`opo report`: its command line; the page is made in `report/`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console

from opo_megatron.cli.common import add_debug, count_of
from opo_megatron.errors import UserError

SUMMARY = "one HTML page that compares runs: curves, results, times, settings, rollouts"
EPILOG = """\
examples:
  opo report runs/a
      writes report.html: curves, results, times, settings and rollouts of one run
  opo report runs/opo-1 runs/opo-2 runs/rloo-1 runs/rloo-2 --out comparison.html --png figures
      two arms of two seeds each; the page, and its figures as PNG files
  opo report runs/a --trace step.json
      also the last step of a run with rollout.overlap=true, for https://ui.perfetto.dev or chrome://tracing
  opo report runs/* --rollouts 0
      without rollouts

Runs whose settings differ only in run.seed, run.dir or resume form one arm.  The page needs no network and no
other file.  Runs may be unfinished; one without a row in metrics.jsonl is left out.
"""
DEFAULT_GROUPS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo report`."""
    add_debug(parser)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run (its run.dir)")
    add("--out", metavar="FILE.html", type=Path, default=Path("report.html"), help="default report.html")
    add("--png", metavar="DIR", type=Path, help="also write every figure as a PNG file into this folder")
    add(
        "--trace",
        metavar="FILE.json",
        type=Path,
        help="also write the last step that overlapped with generation as a Chrome/Perfetto trace",
    )
    add(
        "--rollouts",
        metavar="N",
        type=count_of("prompts", minimum=0),
        default=DEFAULT_GROUPS,
        help=f"prompts with all their samples in the page, over all runs; default {DEFAULT_GROUPS}",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page and, with --png, the pictures, with --trace, the last step.

    Raises:
        UserError: for a folder that is not a run, and for a path that cannot be written.
    """
    from opo_megatron.report.arms import group_runs
    from opo_megatron.report.runs import leave_out_empty, read_runs
    from opo_megatron.report.timeline import trace_of

    _check_target("--out", options.out, ".html", ".htm")
    if options.trace is not None:
        _check_target("--trace", options.trace, ".json")
    arms = group_runs(leave_out_empty(read_runs(options.runs), lambda line: print(line, file=sys.stderr)))
    runs = [run for arm in arms for run in arm.runs]
    trace = None if options.trace is None else json.dumps(trace_of(runs))
    from opo_megatron.report.figures import figures_of
    from opo_megatron.report.page import make_page

    console = Console(file=sys.stderr, highlight=False)
    with console.status("") as status:

        def show(text: str, done: float) -> None:
            status.update(f"{done:4.0%}  {text}")

        figures = figures_of(arms, options.png is not None, show)
        page = make_page(arms, figures, options.rollouts, show)
    _write(options.out, page.encode())
    if trace is not None:
        _write(options.trace, trace.encode())
    for figure in figures:
        if figure.png is not None:
            _write(options.png / f"{figure.name}.png", figure.png)
    pictures = f"; {len(figures)} figures in {options.png}" if options.png is not None else ""
    traced = f"; the last step as a trace in {options.trace}" if trace is not None else ""
    size = len(page.encode()) / 1e6
    print(f"written to {options.out} ({size:.1f} MB): runs {len(runs)}, arms {len(arms)}{pictures}{traced}")
    return 0


def _check_target(option: str, path: Path, ending: str, *others: str) -> None:
    """Raise early, before the figures, which take a while."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file, such as {path / f'report{ending}'}")
    if path.suffix.lower() not in (ending, *others):
        raise UserError(f"{option} {path} does not end with {ending}; choose a name that does")


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another path") from None
