"""Shared code of `opo convert` and `opo export`: options, ranks, progress lines."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from opo_megatron.cli.common import add_debug, is_launched, run_command_on_ranks
from opo_megatron.config import Config
from opo_megatron.config.arithmetic import smallest_world
from opo_megatron.config.choices import Device
from opo_megatron.config.load import resolve
from opo_megatron.config.schema import ModelConfig, PolicyConfig, RunConfig
from opo_megatron.config.validate import check_experts, check_layout, check_model, check_world
from opo_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

    from opo_megatron.distributed.process_groups import Parallel


def reuse_memory() -> None:
    """Let consecutive tensors reuse memory pages, huge ones where the system has them.

    By default each tensor gets new pages, and mapping them takes longer than copying the weights.  Must be
    called before torch is used; does nothing if the C library is not glibc.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""From glibc's malloc.h."""


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    for name, what in (
        ("tensor", "ranks that share each matrix"),
        ("pipeline", "ranks that share the layers"),
        ("expert", "ranks that share the experts"),
    ):
        parser.add_argument(
            f"--{name}-model-parallel-size", metavar="N", type=int, default=1, help=f"{what} (default: 1)"
        )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the result; default the stored one")
    parser.add_argument(
        "--verify", action="store_true", help="compare log-probabilities of a few prompts with transformers'"
    )
    add_debug(parser)


def torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def config_of(model: ModelConfig, options: argparse.Namespace) -> Config:
    """A validated configuration of the policy alone, on CPUs."""
    tensor, expert = options.tensor_model_parallel_size, options.expert_model_parallel_size
    for name in ("tensor", "pipeline", "expert"):
        if getattr(options, f"{name}_model_parallel_size") < 1:
            raise UserError(f"--{name}-model-parallel-size must be at least 1")
    policy = PolicyConfig(
        model=replace(model),
        device=Device.cpu,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1 if expert > 1 else None,
        sequence_parallel=tensor > 1 and model.num_moe_experts is not None,
        distributed_optimizer=False,
    )
    config = Config(run=RunConfig(dir="unused", distributed_timeout_minutes=60.0), policy=policy)
    resolve(config)
    for check in (check_model, check_layout, check_experts):
        check(policy)
    check_world(config, smallest_world(config))
    return config


class CheckpointCommand:
    """The ranks and progress lines of one conversion."""

    def __init__(self, config: Config, options: argparse.Namespace) -> None:
        self._config, self._arguments = config, options.arguments
        self._world_size = smallest_world(config)
        reuse_memory()

    @property
    def needs_ranks(self) -> bool:
        """Whether this process must start the layout's ranks, instead of being one."""
        return self._world_size > 1 and not is_launched()

    def run_on_ranks(self) -> int:
        """Run the same command on the layout's ranks; returns its exit code."""
        return run_command_on_ranks(self._arguments, self._world_size)

    @contextmanager
    def joined(self) -> Iterator[Parallel]:
        """The process groups of this rank, within this context."""
        from opo_megatron.distributed.process_groups import initialize, shutdown

        yield initialize(self._config)
        shutdown()

    def log(self, line: str) -> None:
        """Print a progress line on rank 0."""
        if os.environ.get("RANK", "0") == "0":
            print(line, flush=True)
