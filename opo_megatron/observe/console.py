"""Console output: a progress line, a line per step, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from opo_megatron.observe.metrics_file import MetricsRow

AGE, REPLAYED = "on_policy/age", "replay/samples"
COLUMNS = {
    "step": ("step", "{:d}"),
    "reward/mean": ("reward", "{:.3f}"),
    "eval/accuracy": ("held-out", "{:.3f}"),
    "eval/greedy_accuracy": ("greedy", "{:.3f}"),
    "response_length/mean": ("length", "{:.1f}"),
    "entropy": ("entropy", "{:.3f}"),
    "grad_norm": ("grad norm", "{:.3f}"),
    "on_policy/logprob_diff_max": ("|Δ log π|", "{:.1e}"),
    AGE: ("OFF-POLICY by", "{:d}"),
    REPLAYED: ("OFF-POLICY samples", "{:d}"),
    "time/step": ("seconds", "{:.2f}"),
}
"""Metrics of the live table, with their headings; those of off-policy runs are shown for these alone."""

VISIBLE_ROWS = 12
REFRESH_SECONDS = 0.1
BAR_WIDTH = 30


class Display:
    """A live table in a terminal, plain lines elsewhere; only the active rank prints."""

    def __init__(self, active: bool) -> None:
        self.console = Console(file=sys.stdout, highlight=False)
        self.active = active
        self._live: Live | None = None
        self._rows: list[MetricsRow] = []
        self._status, self._done = "", 0.0
        self._last_refresh = 0.0
        if active and self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()

    def status(self, text: str, done: float = 0.0) -> None:
        """The current work and the fraction done (0 to 1); shown in a terminal only."""
        self._status, self._done = text, done
        if self._live is not None and time.monotonic() - self._last_refresh > REFRESH_SECONDS:
            self._refresh()

    def log(self, text: str) -> None:
        """Print a line."""
        if self.active:
            self.console.print(text, markup=False, soft_wrap=True)

    def row(self, row: MetricsRow) -> None:
        """Show the row of a finished step."""
        self._rows.append(row)
        if self._live is not None:
            self._refresh()
        elif self.active:
            pairs = [
                f"{head} {spec.format(row[name])}" for name, (head, spec) in COLUMNS.items() if name in row
            ]
            self.console.print("  ".join(pairs), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop the live table and restore the terminal."""
        if self._live is not None:
            self._status = ""
            self._refresh()
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        assert self._live is not None
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        present = {name for row in self._rows for name in row}
        shown = {n: column for n, column in COLUMNS.items() if n not in (AGE, REPLAYED) or n in present}
        for heading, _ in shown.values():
            table.add_column(heading, justify="right")
        for row in self._rows[-VISIBLE_ROWS:]:
            table.add_row(*(spec.format(row[n]) if n in row else "" for n, (_, spec) in shown.items()))
        progress = Table.grid(padding=(0, 1))
        if self._status:
            progress.add_row(ProgressBar(1.0, self._done, width=BAR_WIDTH), self._status)
        self._live.update(Group(table, progress) if self._rows else progress, refresh=True)
        self._last_refresh = time.monotonic()

    def summary(
        self, title: str, lines: Sequence[Sequence[str]], columns: Sequence[str] = ("start", "end")
    ) -> None:
        """Print the closing table; a line is (name, a value per column, and optionally its meaning)."""
        if not self.active:
            return
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("", *columns):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        if len(lines[0]) > len(columns) + 1:
            table.add_column("meaning", overflow="fold")
        for line in lines:
            table.add_row(*line)
        self.console.print(table)
