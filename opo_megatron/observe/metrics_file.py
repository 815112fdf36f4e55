"""A JSON-lines file with one object per step, never half a step.

A row is written at once and is on disk before `append` returns.  A resumed run first deletes the rows after
its checkpoint and a partial last line.  A value that was not measured is absent.  Only values under time/,
memory/, throughput/, run/ and overlap/ may differ between identical runs.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from opo_megatron.errors import UserError

MetricsRow = dict[str, Any]


class MetricsFile:
    """Appends rows in step order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[MetricsRow]:
        """All complete rows; a partial last line is skipped.

        Raises:
            UserError: for a complete line that is not JSON.
        """
        if not self.path.exists():
            return []
        complete = self.path.read_bytes().split(b"\n")[:-1]
        return [self._parse(line, number) for number, line in enumerate(complete, 1)]

    def _parse(self, line: bytes, number: int) -> MetricsRow:
        try:
            row: MetricsRow = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"{self.path} line {number} is not JSON ({error}); fix or delete the line"
            ) from None
        return row

    def truncate_after(self, step: int) -> None:
        """Delete the rows after `step`, and a partial last line."""
        rows = [row for row in self.read() if row["step"] <= step]
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def append(self, row: MetricsRow) -> None:
        with self.path.open("a") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())


def _line(row: MetricsRow) -> str:
    """One JSON line; non-finite values become null, because JSON has none."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
