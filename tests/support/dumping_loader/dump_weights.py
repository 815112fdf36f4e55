"""A custom weight loader of SGLang that loads nothing: it writes what each rank of the server holds.

Imported by the server, so it needs nothing but torch and SGLang.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def dump(model: Any, named: list[tuple[str, Any]]) -> None:
    """Write every parameter to a file, which the name of the only tensor names."""
    from sglang.srt.runtime_context import get_parallel

    ((name, _),) = named
    parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    torch.save(parameters, f"{os.environ['DUMPED_WEIGHTS']}/{name}_{get_parallel().tp_rank}.pt")
