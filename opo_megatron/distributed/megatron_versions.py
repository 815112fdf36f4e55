"""What differs between the versions of Megatron-Core: 0.16.1 on Python 3.11, 0.19.2 from 3.12 on.

All other code is the same on both.  Every function has a test in
`tests/distributed/test_megatron_versions.py`, which fails where another version differs once more.

    spec of an MLP      a `ModuleSpec`; a `functools.partial` since 0.18
    parameter groups    a checkpoint's were found by four keys; since 0.19 by their rates as well
    gradients of a norm `get_main_grads_for_grad_norm`; since 0.19 without `main`
    a checkpoint        has its untensored part in `common.pt`; since 0.19 in the `.distcp` files

Left out, because the project avoids it: Megatron's asynchronous writer, deprecated since 0.17 for one of
another package (see `checkpoint/writer.py`), and the base class of strategies, gone since 0.19
(`checkpoint/torch_dist.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from opo_megatron.environment.versions import numbers

VERSION = version("megatron-core")
COMMON_FILE = "common.pt"
IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""Keys of a parameter group that a resumed run cannot change."""
RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
"""Keys of a parameter group that a resumed run may change, and that identify it since 0.19."""


def mlp_submodules(mlp: Any) -> Any:
    """The submodules in the MLP of a layer's spec."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def mlp_of_class(kind: type[MLP], submodules: Any) -> Any:
    """The MLP of a layer's spec: this class with these submodules."""
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(kind.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=kind, submodules=submodules)


def gradients_of_norm(optimizer: Any) -> list[Tensor]:
    """The gradients of this rank's shards that the gradient norm is of."""
    if hasattr(optimizer, "get_grads_for_grad_norm"):
        return list(optimizer.get_grads_for_grad_norm())
    return list(optimizer.get_main_grads_for_grad_norm())


def groups_in(state: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups in the state of an optimizer, or of a chain of them."""
    if isinstance(state, dict):
        for key, value in state.items():
            if key == "param_groups":
                yield from value
            else:
                yield from groups_in(value)


def adopt_rates(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]]) -> None:
    """Give a checkpoint's parameter groups the rates of this run's, in place.

    Groups that differ in their rates only are paired in the order of their rates, so they stay apart.

    Raises:
        ValueError: where the checkpoint has other groups than this run.
    """
    pairs = list(zip(_in_order(saved), _in_order(current), strict=False))
    if len(saved) != len(current) or any(_identity(one) != _identity(other) for one, other in pairs):
        raise ValueError(f"it has {len(saved)} other parameter groups than the {len(current)} of this run")
    for one, other in pairs:
        for key in RATES:
            if key in other:
                one[key] = other[key]
            else:
                one.pop(key, None)


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in IDENTITY)


def _in_order(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By identity, then by rates; a missing rate comes first."""

    def key(group: dict[str, Any]) -> tuple[Any, ...]:
        rates = (group.get(name) for name in RATES)
        return _identity(group), tuple((rate is not None, rate or 0.0) for rate in rates)

    return sorted(groups, key=key)


def reads_common_file_only() -> bool:
    """Whether the installed Megatron-Core needs `common.pt` in a checkpoint."""
    return numbers(VERSION) < (0, 19)


def unreadable_reason(checkpoint: Path) -> str | None:
    """Why the installed Megatron-Core cannot read a checkpoint of a newer one; None where it can."""
    if not reads_common_file_only() or (checkpoint / COMMON_FILE).exists():
        return None
    return (
        f"was written by Megatron-Core 0.19 or newer, and {VERSION} cannot read it; resume the run with the "
        "Python it began with (make setup PYTHON=python3.12)"
    )
