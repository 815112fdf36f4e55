"""Megatron-Core without CUDA: call `install("cpu")` once, before creating any Megatron object.

`megatron.core` is device-neutral except for four things that fail without a CUDA device: the current
device and its streams, the device's random state, string literals such as `device="cuda"`, and two
helpers of its MoE layer.  `install` replaces exactly those and leaves all computation unchanged.  With
a CUDA policy nothing is patched.

String literals cannot be patched from outside a function, so the constants of the compiled
functions are rewritten in the modules of `LITERAL_MODULES`.  `tests/distributed/test_cpu_backend.py` scans
Megatron's source and fails when a new version names CUDA where this file does not look.

`install("meta")` maps the same places to meta tensors, for counting bytes without allocating them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any, Literal

import torch

LITERAL_MODULES = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.utils",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
)
"""Modules in use whose functions name CUDA in a string literal."""

PATCHED_CUDA_NAMES = frozenset(
    {
        "current_device",
        "synchronize",
        "get_rng_state",
        "set_rng_state",
        "manual_seed",
        "Stream",
        "Event",
        "current_stream",
        "default_stream",
        "stream",
    }
)
"""Attributes of torch.cuda that `install` replaces."""

_installed: str | None = None


class _NoStream:
    """Replaces CUDA streams and events: on a CPU all operations run in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _in_order(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = wait = record = _in_order

    def record_event(self, *args: Any) -> _NoStream:
        return self

    def query(self) -> bool:
        return True


def install(device: Literal["cpu", "meta"]) -> None:
    """Map Megatron-Core's CUDA names to `device` for the rest of this process.

    Raises:
        RuntimeError: when another device is installed already.
    """
    global _installed
    if _installed is not None:
        if _installed != device:
            raise RuntimeError(f"Megatron already runs on {_installed!r} in this process, not on {device!r}")
        return
    _installed = device
    _replace_device(torch.device(device))
    _replace_streams()
    _replace_random_state()
    _patch_moe()
    # Megatron decorates small functions with torch.compile, which would start a C++ compiler on a CPU.
    torch.compiler.set_stance("force_eager")
    literals = literal_map(device)
    for name in LITERAL_MODULES:
        _rewrite_module(importlib.import_module(name), literals)


def literal_map(device: str) -> dict[str, str]:
    """Megatron's string literals that name CUDA → their replacements."""
    prefix = "torch." if device == "cpu" else f"torch.{device}."
    kinds = ("FloatTensor", "HalfTensor", "BFloat16Tensor")
    return {"cuda": device, **{f"torch.cuda.{kind}": prefix + kind for kind in kinds}}


def _replace_device(device: torch.device) -> None:
    def to_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.to(device)

    _set(torch.cuda, "current_device", lambda: device)
    _set(torch.cuda, "synchronize", lambda device=None: None)
    _set(torch.Tensor, "cuda", to_device)
    _set(torch.nn.Module, "cuda", to_device)


def _replace_streams() -> None:
    null_stream = _NoStream()
    _set(torch.cuda, "Stream", _NoStream)
    _set(torch.cuda, "Event", _NoStream)
    _set(torch.cuda, "current_stream", lambda device=None: null_stream)
    _set(torch.cuda, "default_stream", lambda device=None: null_stream)
    _set(torch.cuda, "stream", lambda stream: null_stream)
    _set(torch.Tensor, "record_stream", lambda self, stream: None)


def _replace_random_state() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    _set(torch.cuda, "get_rng_state", get_state)
    _set(torch.cuda, "set_rng_state", set_state)
    _set(torch.cuda, "manual_seed", torch.manual_seed)
    _set(megatron_random, "_get_cuda_rng_state", get_state)
    _set(megatron_random, "_set_cuda_rng_state", set_state)
    # CPU and device share one generator, so Megatron's check of an unchanged CPU state always warns.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _patch_moe() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 does not define it without Transformer Engine
        _set(moe_utils, "te_general_gemm", None)

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # Megatron converts only CUDA tensors, but all_to_all needs host arrays on any device.
        return tensor.detach().cpu().numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    _set(moe_utils, "maybe_move_tensor_to_cpu", to_host)
    _set(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _rewrite_module(module: types.ModuleType, literals: dict[str, str]) -> None:
    for function in module_functions(module):
        function.__code__ = _rewrite_code(function.__code__, literals)


def module_functions(module: types.ModuleType) -> list[types.FunctionType]:
    """All functions and methods that `module` itself defines, without decorators."""
    functions: dict[int, types.FunctionType] = {}

    def visit(value: Any) -> None:
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if isinstance(value, property):
            for accessor in (value.fget, value.fset, value.fdel):
                visit(accessor)
        elif inspect.isclass(value):
            if value.__module__ == module.__name__:
                for member in list(vars(value).values()):
                    if member is not value:
                        visit(member)
        elif callable(value):
            bare: Callable[..., Any] = inspect.unwrap(value)
            if isinstance(bare, types.FunctionType) and bare.__module__ == module.__name__:
                functions[id(bare)] = bare

    for value in list(vars(module).values()):
        visit(value)
    return list(functions.values())


def _rewrite_code(code: types.CodeType, literals: dict[str, str]) -> types.CodeType:
    def replaced(constant: Any) -> Any:
        if isinstance(constant, types.CodeType):
            return _rewrite_code(constant, literals)
        if isinstance(constant, str):
            return literals.get(constant, constant)
        if isinstance(constant, tuple):
            return tuple(replaced(item) for item in constant)
        return constant

    constants = tuple(replaced(constant) for constant in code.co_consts)
    return code if constants == code.co_consts else code.replace(co_consts=constants)
