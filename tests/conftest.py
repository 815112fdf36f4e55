"""What tests share: parts that may be missing, and ranks that are started once per file."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def require(module: str, command: str) -> ModuleType:
    """Import `module`, or skip and say which command installs it; with OPO_REQUIRE_ALL=1 fail instead."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = f"{module} is missing ({error}); install it with: {command}"
        if os.environ.get("OPO_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
