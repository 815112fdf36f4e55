"""The files that trainer and server share, imported from the trainer's package by their path.

They need nothing but torch.  The packages they lie in do more when they are imported, or need what SGLang's
environment lacks; so each of those is an empty module here that only says where its files are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[3]
_FOLDERS = ("", "config", "kernels", "rollout", "rollout.local", "utils")


def _add_empty_packages() -> None:
    for folder in _FOLDERS:
        name = ".".join(filter(None, (PACKAGE.name, folder)))
        package = ModuleType(name, "Files shared with the trainer.")
        package.__path__ = [str(PACKAGE.joinpath(*folder.split(".")))]
        sys.modules.setdefault(name, package)


_add_empty_packages()

from opo_megatron.config.choices import RopeType  # noqa: E402
from opo_megatron.kernels import exact, exact_digest, exact_sampling  # noqa: E402
from opo_megatron.rollout.local.decoder import Decoder  # noqa: E402

__all__ = ["Decoder", "RopeType", "exact", "exact_digest", "exact_sampling"]
