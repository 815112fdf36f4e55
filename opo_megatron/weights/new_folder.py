"""A folder that appears under its name only when it is complete."""

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
    """Refuse a folder that holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another name")


@contextmanager
def new_folder(folder: Path, leads: bool = True) -> Iterator[Path]:
    """Yield `<folder>.partial`, which takes the name `folder` at the end and is removed on an error.

    Args:
        leads: whether this rank makes, renames and removes it; the others only learn its name.

    Raises:
        UserError: where the disk is full.
    """
    partial = folder.with_name(folder.name + ".partial")
    if leads:
        check_new(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        if leads:
            os.replace(partial, folder)
    except BaseException as error:
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(
                f"the disk of {folder} is full ({error.strerror}), so nothing was written; make room or "
                "choose another disk"
            ) from None
        raise
