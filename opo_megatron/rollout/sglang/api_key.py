"""The key of a run's SGLang servers: whoever has it can replace the weights.

    named      `rollout.sglang.api_key` names the environment variable that holds it
    in a file  `rollout.sglang.api_key_file`, of mode 0600, between the nodes of a job
    random     for a server that the run starts itself

A server gets it through a pipe, its standard input (`serve.py`): command lines and environments are shown to
others by `ps` and logs.  No recipe, log or file of a run has it, except the file above.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from opo_megatron.config.rollout import SglangConfig
from opo_megatron.config.rules.api_key import is_key, named_key, variable_of
from opo_megatron.errors import UserError
from opo_megatron.utils.start_folder import absolute

_OTHERS = 0o077


def random_key() -> str:
    """A new key, of 256 bits."""
    return secrets.token_urlsafe(32)


def shared_key(settings: SglangConfig, makes_file: bool = False) -> str | None:
    """The key that the recipe names, in a variable or a file; None where it names neither.

    Args:
        makes_file: create the file where it does not exist.

    Raises:
        UserError: for a variable or file without a key, and for a file that others can read.
    """
    variable = variable_of(settings)
    if variable is not None:
        return named_key(variable)
    if settings.api_key_file is None:
        return None
    path = absolute(settings.api_key_file)
    try:
        if makes_file:
            _make_file(path)
        return _read_file(path)
    except FileNotFoundError:
        raise UserError(
            f"rollout.sglang.api_key_file={path} does not exist; start the servers first, by `opo serve` "
            "with the same file"
        ) from None
    except OSError as error:
        raise UserError(
            f"rollout.sglang.api_key_file={path} cannot be used ({error.strerror}); name a file of your own"
        ) from None


def _make_file(path: Path) -> None:
    """Create the file with a random key unless it exists; of several servers at once, the first one does."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, new = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(random_key() + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(new, path)  # unlike a rename, it never replaces the file of another server
    finally:
        os.unlink(new)


def _read_file(path: Path) -> str:
    mode = path.stat().st_mode & 0o777
    if mode & _OTHERS:
        raise UserError(
            f"rollout.sglang.api_key_file={path} may be opened by others (its mode is {mode:04o}); delete "
            "it, and `opo serve` makes a new one"
        )
    key = path.read_text(errors="replace").strip()
    if not is_key(key):
        raise UserError(
            f"rollout.sglang.api_key_file={path} does not hold a key, which is one line of printable ASCII "
            "without spaces; delete it, and `opo serve` makes a new one"
        )
    return key
