"""One rank of many, without the others: its process groups, its policy on the meta device, its bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from opo_megatron.config.schema import Config
from opo_megatron.distributed import cpu_backend
from opo_megatron.distributed.process_groups import Parallel, megatron_groups, shutdown
from opo_megatron.policy.policy import Policy
from opo_megatron.weights.sharding import Vocabulary

META = torch.device("meta")


@dataclass(frozen=True)
class RankBytes:
    """What one rank holds throughout the run, in bytes."""

    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    parameters: int
    gradients: int
    optimizer: int
    """Master weights, if any, and two moments of this rank's shard; the part on the GPU."""
    own_parameters: int
    """Elements that only this rank counts: the first rank counts replicated ones, no rank the padding of the
    vocabulary.  Their sum over all ranks is the model."""

    host_optimizer: int = 0
    """The part of the optimizer in host memory, under policy.optimizer_offload."""

    @property
    def static(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def use_meta_device() -> None:
    """Make Megatron build on the meta device for the rest of this process.

    Raises:
        RuntimeError: where the process has built policies on another device.
    """
    cpu_backend.install("meta")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    # torch queries the backend of the tensors' device for coalescing, and meta has none.
    dist.batch_isend_irecv = _one_by_one  # type: ignore[assignment]


def _one_by_one(operations: list[Any]) -> list[Any]:
    return [one.op(one.tensor, one.peer, one.group) for one in operations]


@contextmanager
def fake_rank(config: Config, rank: int, world_size: int) -> Iterator[Parallel]:
    """Make the process one of `world_size` ranks, whose collectives do nothing, within this context."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield megatron_groups(config, META)
    finally:
        shutdown()


def meta_policy(config: Config, vocab_size: int, parallel: Parallel) -> Policy:
    """This rank's part of the policy, shapes only."""
    with META:
        return Policy(config, vocab_size, parallel, config.optimizer, weights=None)


def rank_bytes(policy: Policy) -> RankBytes:
    """Count what a policy holds after its first step.

    Raises:
        ValueError: naming parameters of the model that the parameter mapping does not cover.
    """
    parallel = policy.parallel
    weights = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    buffers = [b for chunk in policy.ddp_chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    _allocate_moments(policy)
    weight_storages = _storages(weights)
    return RankBytes(
        rank=parallel.rank,
        tp_rank=parallel.tp_rank,
        pp_rank=parallel.pp_rank,
        cp_rank=parallel.cp_rank,
        dp_rank=parallel.dp_rank,
        parameters=sum(weight_storages.values()),
        gradients=sum(_storages(buffer.grad_data for buffer in buffers).values()),
        optimizer=sum(
            size for key, size in _storages(_optimizer_tensors(policy)).items() if key not in weight_storages
        ),
        own_parameters=_own_parameters(policy),
    )


def offloaded(rank: RankBytes, fraction: float) -> RankBytes:
    """`rank` with a fraction of the optimizer in host memory (`policy.optimizer_offload`)."""
    host = round(rank.optimizer * fraction)
    return replace(rank, optimizer=rank.optimizer - host, host_optimizer=host)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes per storage: views and shared parameters count once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def inner_optimizers(policy: Policy) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside Megatron's wrappers."""
    chained = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    return [one.optimizer for one in chained]


def _allocate_moments(policy: Policy) -> None:
    """Make the optimizer allocate its state by a step, which changes no values on meta tensors."""
    for optimizer in inner_optimizers(policy):
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for master in masters:
            master.grad = torch.empty_like(master)
        optimizer.step()
        for master in masters:
            master.grad = None


def _optimizer_tensors(policy: Policy) -> Iterator[Tensor]:
    for optimizer in inner_optimizers(policy):
        yield from (parameter for group in optimizer.param_groups for parameter in group["params"])
        states = (value for state in optimizer.state.values() for value in state.values())
        yield from (value for value in states if isinstance(value, Tensor))


def _own_parameters(policy: Policy) -> int:
    parallel, total = policy.parallel, 0
    remaining = [dict(chunk.named_parameters()) for chunk in policy.chunks]
    for parameter in policy.param_mapping:
        if parameter.stage != parallel.pp_rank:
            continue
        weight = remaining[parameter.chunk].pop(parameter.mcore_name)
        is_replica = parameter.sharding.partition_dim is None and parallel.tp_rank > 0
        dp_rank = parallel.edp_rank if parameter.is_expert else parallel.dp_cp_rank
        if dp_rank or is_replica or parameter.tied_duplicate:
            continue
        rows = weight.shape[0]
        if isinstance(parameter.sharding, Vocabulary):
            rows = max(0, min(rows, policy.vocab_size - parallel.tp_rank * rows))
        total += rows * math.prod(weight.shape[1:])
    unmapped = [name for names in remaining for name in names]
    if unmapped:
        raise ValueError(f"no tensors are mapped to {', '.join(unmapped)}")
    return total
