"""Parts that only some tasks need, and what to say where one is not installed."""

from __future__ import annotations

import importlib
from typing import Any

from opo_megatron.errors import UserError


def load_part(module: str, wanted_by: str, extra: str) -> Any:
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
