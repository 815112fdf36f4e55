"""The last overlapped step of a run, from `timeline.jsonl`: as bars for the figure, as a trace for Perfetto.

The trace is Chrome's JSON: one process per rank with a thread for its trainer and one for its engine, whose
counter shows how many responses are unfinished.  https://ui.perfetto.dev and chrome://tracing open it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from opo_megatron.errors import UserError
from opo_megatron.observe.step_timeline import ENDED, ENGINE
from opo_megatron.report.runs import Run

TRAINER = "trainer"
THREADS = {TRAINER: 1, ENGINE: 2}
MICROSECONDS = 1e6


class Bar(NamedTuple):
    """One interval, in seconds since the step began."""

    row: str
    """`trainer` or `engine`."""
    name: str
    begin: float
    end: float


def bars_of(rank: dict[str, Any]) -> list[Bar]:
    """The intervals of one rank of a row of timeline.jsonl, by their begin."""
    bars = [
        Bar(ENGINE if name == ENGINE else TRAINER, name, begin, end)
        for name, intervals in rank.items()
        if name != ENDED
        for begin, end in intervals
    ]
    return sorted(bars, key=lambda bar: bar.begin)


def trace_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The last overlapped step of each run as a trace.

    Raises:
        UserError: where no run has one.
    """
    events: list[dict[str, Any]] = []
    process = 0
    for run in runs:
        row = run.timeline or {"ranks": []}
        for rank, columns in enumerate(row["ranks"]):
            name = f"rank {rank}" if len(runs) == 1 else f"{run.name}, rank {rank}"
            events += _events(process, f"{name}, step {row['step']}", columns)
            process += 1
    if not events:
        names = ", ".join(str(run.path) for run in runs)
        raise UserError(
            f"--trace, but no timeline.jsonl of {names} has a row; only steps with rollout.overlap=true are "
            "recorded there, so leave --trace out"
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _events(process: int, name: str, columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield _metadata(process, 0, "process_name", name)
    for row, thread in THREADS.items():
        yield _metadata(process, thread, "thread_name", row)
    bars = bars_of(columns)
    for bar in bars:
        yield {
            "ph": "X",
            "name": bar.name,
            "cat": "step",
            "pid": process,
            "tid": THREADS[bar.row],
            "ts": _microseconds(bar.begin),
            "dur": _microseconds(bar.end - bar.begin),
        }
    began = next((bar.begin for bar in bars if bar.row == ENGINE), None)
    if began is None:
        return
    ended = columns[ENDED]
    for count, seconds in enumerate([began, *ended]):
        yield {
            "ph": "C",
            "name": "unfinished responses",
            "pid": process,
            "ts": _microseconds(seconds),
            "args": {"responses": len(ended) - count},
        }


def _metadata(process: int, thread: int, kind: str, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _microseconds(seconds: float) -> float:
    return round(seconds * MICROSECONDS, 1)
