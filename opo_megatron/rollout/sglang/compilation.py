"""Whether an SGLang server compiles its kernels, for which it answers nothing, not even its health check.

It compiles while it starts and at its first forward passes (up to a minute on a GPU, once per machine), with
nvcc and ninja or with Triton.  Two signs tell that from a server that hangs: compilers among its processes,
and a log whose last line speaks of compiling.
"""

from __future__ import annotations

import math
import re
import threading
import time
from pathlib import Path

import psutil

COMPILERS = frozenset(
    {
        *("nvcc", "cicc", "ptxas", "fatbinary", "cudafe++", "nvlink", "ninja", "cmake"),
        *("g++", "c++", "gcc", "cc", "cc1plus", "cc1", "clang", "clang++", "as", "ld", "collect2"),
    }
)
"""Names of processes that compile.  Python processes are no sign: torch keeps idle compile workers."""
LOG_SIGN = re.compile(
    rb"\bcompil(?:e|es|ing|ation)\b|\bninja\b|\bnvcc\b|tvm_ffi|torch\W_?inductor|\bjit\b", re.IGNORECASE
)
LOG_SECONDS = 90.0
"""How long such a line counts where no other follows; the server compiled for up to 60 seconds."""
LOG_TAIL = 4096
INTERVAL_SECONDS = 1.0
"""Looking at all processes takes milliseconds, so several threads share what one has seen."""


class CompileWatch:
    """One server of this machine, from its start to its end."""

    def __init__(self, name: str, pid: int, log: Path, limit: float, begin: int) -> None:
        """
        Args:
            name: of the server, for `activity`.
            pid: of its main process.
            log: file with its output.
            limit: seconds of compiling, in all, after which it counts as hung.
            begin: offset in the log where this server's output begins.
        """
        self.name, self.pid, self.log, self.limit, self.begin = name, pid, log, limit, begin
        self._lock = threading.Lock()
        self._looked, self._seconds = -math.inf, 0.0
        self._sign: str | None = None

    def __getstate__(self) -> tuple[str, int, Path, float, int]:
        """For other processes of the machine, which look for themselves."""
        return self.name, self.pid, self.log, self.limit, self.begin

    def __setstate__(self, state: tuple[str, int, Path, float, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def activity(self) -> str | None:
        """A line for the display while the server compiles, else None."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= INTERVAL_SECONDS:
                if self._sign is not None:
                    self._seconds += min(now - self._looked, 10 * INTERVAL_SECONDS)
                self._looked, self._sign = now, self._look()
            if self._sign is None or self._seconds > self.limit:
                return None
            return f"SGLang {self.name} compiles its kernels ({self._sign})  {self._seconds:.0f} s"

    def _look(self) -> str | None:
        """The compiler that runs, or the file that says so."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            for child in process.children(recursive=True):
                try:
                    if (name := child.name()) in COMPILERS and child.status() != psutil.STATUS_ZOMBIE:
                        return name
                except psutil.Error:  # it ended meanwhile
                    continue
        except psutil.Error:
            return None  # a server that is gone compiles nothing
        return self.log.name if self._log_says_so() else None

    def _log_says_so(self) -> bool:
        """Whether the last line of this server's log speaks of compiling, and is not old."""
        try:
            stat = self.log.stat()
            if time.time() - stat.st_mtime > LOG_SECONDS:
                return False
            with self.log.open("rb") as log:
                log.seek(max(self.begin, stat.st_size - LOG_TAIL))
                lines = log.read().strip().splitlines()
        except OSError:
            return False
        return bool(lines) and LOG_SIGN.search(lines[-1]) is not None
