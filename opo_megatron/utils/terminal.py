"""What a command writes to the terminal: characters that its encoding lacks, and warnings of other packages.

A terminal need not be UTF-8 (`PYTHONIOENCODING=ascii`, a Latin-1 locale).  Signs of our own output become
what one would type instead (→ is ->, × is x); any other character becomes its escape, so nothing is lost.

Warnings of imported packages concern their authors; no user can act on them.  Shown are our own
(`OpoWarning`), those of the user's code, and all errors.

Imports only the standard library: `opo doctor` starts with it where packages are missing.
"""

from __future__ import annotations

import codecs
import io
import locale
import logging
import os
import sys
import sysconfig
import unicodedata
import warnings
from pathlib import Path
from typing import TextIO

from opo_megatron.errors import OpoWarning

READABLE = "opo_readable"
"""The name of the error handler, for `errors=` of a text stream."""

_SIGNS = {
    "→": "->", "×": "x", "·": "*", "±": "+/-", "−": "-", "–": "-", "—": "-", "…": "...", "≠": "!=", "≤": "<=",
    "≥": ">=", "≈": "~", "‖": "||", "‹": "<", "›": ">", "Δ": "d", "Σ": "sum", "∇": "grad ", "π": "pi",
    "ρ": "rho", "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip
_SPINNER = range(0x2800, 0x2900)
"""Braille patterns, the frames of rich's spinner."""
_STRICT = ("strict", "surrogateescape", "backslashreplace")
"""The error handlers that Python chooses by itself; any other is the user's choice."""
_INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_STANDARD_LIBRARY = os.path.join(sysconfig.get_path("stdlib"), "")
_OWN_FOLDER = os.path.join(Path(__file__).parents[1], "")


def prepare_terminal(shows_warnings: bool = False) -> None:
    """Prepare this process's streams and warnings; the first thing a command does.

    Args:
        shows_warnings: also those of imported packages.
    """
    use_utf8()
    codecs.register_error(READABLE, readable)
    for stream in (sys.stdout, sys.stderr):
        make_printable(stream)
    if not shows_warnings:
        hide_package_warnings()


def use_utf8() -> None:
    """Start this command again in Python's UTF-8 mode, if the locale's encoding is another.

    Files, names of files and arguments are UTF-8, and torch cannot even be imported otherwise.  The streams
    keep the locale's encoding.
    """
    is_utf8 = sys.flags.utf8_mode or codecs.lookup(locale.getencoding()).name == "utf-8"
    if is_utf8 or os.environ.get("PYTHONUTF8") == "1":
        return
    streams = f"{locale.getencoding()}:backslashreplace"
    environment = {"PYTHONIOENCODING": streams, **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def make_printable(stream: TextIO | None) -> None:
    """Let a stream write every character, whatever its encoding."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in _STRICT:
        stream.reconfigure(errors=READABLE)


def readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """The replacement of the characters that an encoding lacks; an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    if all("\udc80" <= character <= "\udcff" for character in bad):  # bytes of a file's name, as they were
        return bytes(ord(character) - 0xDC00 for character in bad), error.end
    return "".join(map(_replacement, bad)), error.end


def _replacement(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if ord(character) in _SPINNER:
        return "*"
    plain = unicodedata.normalize("NFKC", character)
    if not plain.isascii():
        return character.encode("ascii", "backslashreplace").decode()
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return {"<super>": "^", "<sub>": "_"}.get(kind, "") + plain  # x² is x^2, wⱼ is w_j


def hide_package_warnings() -> None:
    """Drop warnings, by `warnings` or by `logging`, that neither we nor the user's code give."""
    warnings.showwarning = _show_warning
    logging.setLoggerClass(_QuietLogger)


def is_package(file: str) -> bool:
    """Whether a source file belongs to an installed package or to Python itself, and not to us."""
    is_installed = file.startswith(_STANDARD_LIBRARY) or any(folder in file for folder in _INSTALLED)
    return is_installed and not file.startswith(_OWN_FOLDER)


_show_in_python_style = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, OpoWarning):
        print(f"warning: {message}", file=file or sys.stderr, flush=True)
    # A package may name the line that called it: a warning in our own code that is not ours is of a package.
    elif not is_package(filename) and not filename.startswith(_OWN_FOLDER):
        _show_in_python_style(message, category, filename, lineno, file, line)


class _QuietLogger(logging.getLoggerClass()):  # type: ignore[misc]
    """The class of all loggers made from now on, which packages do when they are imported."""

    def handle(self, record: logging.LogRecord) -> None:
        if record.levelno != logging.WARNING or not is_package(record.pathname):
            super().handle(record)
