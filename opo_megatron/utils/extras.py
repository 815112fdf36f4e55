"""Parts that only some recipes need, and what to say where one is not installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opo_megatron.errors import UserError


def require_extra(module: str, wanted_by: str, extra: str) -> Any:
    """Import a module of an optional extra.

    Raises:
        UserError: naming the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{wanted_by} needs {module}, which does not import ({error}); "
            f"install it with: pip install 'opo-megatron[{extra}]'"
        ) from None


@contextmanager
def block_import(module: str) -> Iterator[None]:
    """Within this context importing `module` fails, for a library that tries to without being asked."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
