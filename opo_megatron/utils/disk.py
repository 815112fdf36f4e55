"""What is said where a run's files cannot be written: a full disk is the user's to mend, not a bug."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opo_megatron.errors import UserError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextmanager
def report_disk_errors(folder: str | Path) -> Iterator[None]:
    """Within this context what the file system refuses is a UserError that names `folder`."""
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
    """The sentence about a folder that takes no more."""
    return UserError(
        f"{folder} cannot be written ({reason}); give it space and permission and go on with resume=auto, "
        "or choose another run.dir"
    )


def _concerns(folder: str | Path, error: OSError) -> bool:
    """Whether the error is about the folder: what is missing or forbidden elsewhere is another matter."""
    if not isinstance(error.filename, str):
        return False
    place, whole = Path(error.filename).absolute(), Path(folder).absolute()
    return place in (whole, *whole.parents) or whole in place.parents
