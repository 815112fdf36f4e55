"""One rank of many, without the others: its groups, its policy on the meta device, and the bytes of it."""

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
    """What one rank holds for as long as the run lasts, in bytes."""

    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    parameters: int
    gradients: int
    optimizer: int
    """Master weights where there are any, and two moments, of this rank's shard, as far as they are on the
    GPU."""
    own_parameters: int
    """Elements that no other rank counts: replicated ones fall to the first rank that has them, padding of
    the vocabulary to nobody.  Summed over all ranks they are the model."""

    host_optimizer: int = 0
    """The same in host memory, under policy.optimizer_offload."""

    @property
    def static(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def use_meta_device() -> None:
    """Make Megatron build on the meta device in this process, for good.

    Raises:
        RuntimeError: where the process has built policies on another device.
    """
    cpu_backend.install("meta")
    logging.getLogger("megatron").setLevel(logging.WARNING)
    # torch asks the backend whether it can coalesce, and meta tensors have none.
    dist.batch_isend_irecv = _one_by_one  # type: ignore[assignment]


def _one_by_one(operations: list[Any]) -> list[Any]:
    return [one.op(one.tensor, one.peer, one.group) for one in operations]


@contextmanager
def fake_rank(config: Config, rank: int, world_size: int) -> Iterator[Parallel]:
    """Within this context the process is one of `world_size` ranks, whose collectives do nothing."""
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
    """Count what a policy holds once it has taken a step.

    Raises:
        ValueError: naming a parameter of the model that the table does not cover.
    """
    parallel = policy.parallel
    weights = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    buffers = [b for chunk in policy.ddp_chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    _allocate_moments(policy)
    known = _storages(weights)
    return RankBytes(
        rank=parallel.rank,
        tp_rank=parallel.tp_rank,
        pp_rank=parallel.pp_rank,
        cp_rank=parallel.cp_rank,
        dp_rank=parallel.dp_rank,
        parameters=sum(known.values()),
        gradients=sum(_storages(buffer.grad_data for buffer in buffers).values()),
        optimizer=sum(
            size for key, size in _storages(_optimizer_tensors(policy)).items() if key not in known
        ),
        own_parameters=_own_parameters(policy),
    )


def offloaded(rank: RankBytes, share: float) -> RankBytes:
    """With a share of the optimizer in host memory, as `policy.optimizer_offload` says."""
    host = round(rank.optimizer * share)
    return replace(rank, optimizer=rank.optimizer - host, host_optimizer=host)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage: views and shared parameters count once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def inner_optimizers(policy: Policy) -> list[torch.optim.Optimizer]:
    """The optimizers behind Megatron's wrappers."""
    chained = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    return [one.optimizer for one in chained]


def _allocate_moments(policy: Policy) -> None:
    """Let the optimizer make its state as its first step does; meta tensors have no values to change."""
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
        copy = parallel.edp_rank if parameter.is_expert else parallel.dp_cp_rank
        if copy or is_replica or parameter.tied_duplicate:
            continue
        rows = weight.shape[0]
        if isinstance(parameter.sharding, Vocabulary):
            rows = max(0, min(rows, policy.vocab_size - parallel.tp_rank * rows))
        total += rows * math.prod(weight.shape[1:])
    missed = [name for names in remaining for name in names]
    if missed:
        raise ValueError(f"no tensors are mapped to {', '.join(missed)}")
    return total
