"""A JSON-lines file of one object per step, which never holds half a step.

A row is written in one piece and is on disk before `append` returns.  A resumed run first cuts what
lies behind its checkpoint, a torn last line included.  A value that was not measured is absent.
Values that may differ between identical runs live only under time/, memory/, throughput/, run/.
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
        """All complete rows; a torn last line is left out.

        Raises:
            UserError: for a line before it that is not JSON.
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
                f"{self.path} line {number} is not JSON ({error}); take the line out, or mend it"
            ) from None
        return row

    def cut_after(self, step: int) -> None:
        """Drop every row behind `step`, and a torn last line."""
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
    """One JSON line; NaN and infinity are written as null, because JSON has neither."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite) + "\n"
