"""Imports of optional extras, with the install command in the error."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opo_megatron.errors import UserError


def require_extra(module: str, required_by: str, extra: str) -> Any:
    """Import a module of an optional extra.

    Raises:
        UserError: with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{required_by} needs {module}, which cannot be imported ({error}); "
            f"install it with: pip install 'opo-megatron[{extra}]'"
        ) from None


@contextmanager
def block_import(module: str) -> Iterator[None]:
    """Make `import module` fail in this context, for libraries that import it whenever it is installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
