"""The folder that a command was started in: relative paths keep their meaning when anybody's code changes it.

Recipes keep the paths that the user wrote; whoever opens one makes it absolute here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opo_megatron.errors import UserError

_folder: Path | None = None


@contextmanager
def started_here() -> Iterator[None]:
    """Relative paths are those of the current folder from here on, whatever `os.chdir` does within it.

    Raises:
        UserError: where the current folder has been deleted.
    """
    global _folder
    before = _folder
    try:
        _folder = Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder no longer exists; change to another one") from None
    try:
        yield
    finally:
        _folder = before


def start_folder() -> Path:
    """Where the command was started; the current folder outside of a command."""
    return Path.cwd() if _folder is None else _folder


def shown(path: Path) -> str:
    """A path for a message: without the folder that the command was started in."""
    return str(path.relative_to(start_folder()) if path.is_relative_to(start_folder()) else path)


def absolute(path: str | Path) -> Path:
    """A path as it was when the command was started."""
    return Path(path) if Path(path).is_absolute() else start_folder() / path


def to_open(path: str | Path) -> Path:
    """The path of what is read at once: as the user wrote it, for messages, where that leads there."""
    return Path(path) if start_folder() == Path.cwd() else absolute(path)
