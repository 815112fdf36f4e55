"""Errors of writing a run's files, such as a full disk, as a UserError: the user can fix them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opo_megatron.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextmanager
def report_disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn errors of the file system about `folder` into a UserError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno not in _FULL and not _concerns(folder, error):
            raise
        raise cannot_write(folder, str(error)) from error
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise cannot_write(folder, str(error)) from error


def cannot_write(folder: str | Path, reason: str) -> UserError:
    """The error for a folder that cannot be written."""
    return UserError(
        f"{folder} cannot be written ({reason}); free space or fix its permissions and resume with "
        "resume=auto, or choose another run.dir"
    )


def _concerns(folder: str | Path, error: OSError) -> bool:
    """Whether the error is about the folder, its parents or its contents."""
    if not isinstance(error.filename, str):
        return False
    path, root = Path(error.filename).absolute(), Path(folder).absolute()
    return path in (root, *root.parents) or root in path.parents
