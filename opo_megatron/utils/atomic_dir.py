"""Atomic creation of a folder: it gets its name only when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opo_megatron.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_new(folder: Path) -> None:
    """Raise a UserError if `folder` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another name")


@contextmanager
def new_folder(folder: Path, is_writer: bool = True) -> Iterator[Path]:
    """`atomic_dir` for a new folder.

    Raises:
        UserError: if the folder exists, or the disk is full.
    """
    if is_writer:
        check_new(folder)
    try:
        with atomic_dir(folder, is_writer) as partial:
            yield partial
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"the disk of {folder} is full ({error.strerror}), so nothing was written; free space or "
            "choose another disk"
        ) from None


@contextmanager
def atomic_dir(folder: Path, is_writer: bool = True, replaces: bool = False) -> Iterator[Path]:
    """Yield an empty `<folder>.partial`, which is renamed to `folder` at the end, or removed on an error.

    Args:
        is_writer: whether this rank creates, renames and removes it; other ranks only get its path.
        replaces: replace an existing folder.
    """
    partial = folder.with_name(folder.name + ".partial")
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        if is_writer:
            if replaces:  # os.replace overwrites only an empty folder
                shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    except BaseException:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        raise
