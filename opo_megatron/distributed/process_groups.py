"""Process groups, this rank's coordinates in them, and collectives on host data."""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from opo_megatron.config.choices import Device
from opo_megatron.config.schema import Config, PolicyConfig
from opo_megatron.errors import UserError

SMALL_BYTES = 1024
"""Of an exchanged object, with its size before it, that one collective takes."""


@dataclass(frozen=True)
class Parallel:
    """Coordinates of this rank and its process groups."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    """Model chunks per pipeline stage; 1 without virtual stages."""
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    dp_cp_rank: int
    """Index of this rank's copy of the weights; every context-parallel rank of a replica has one."""
    dp_cp_size: int
    ep_rank: int
    ep_size: int
    edp_rank: int
    """Index of this rank's copy of the experts."""
    etp_rank: int
    etp_size: int
    tp_group: Any
    pp_group: Any
    cp_group: Any
    ep_group: Any
    etp_group: Any
    expert_group: Any
    """The ranks that hold one copy of a layer's experts, expert-tensor-parallel ranks innermost."""
    cpu_group: Any
    """All ranks, gloo, for host data."""

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def owns_logits(self) -> bool:
        """Whether this rank adds its tokens to sums: it has logits, and no other rank counts its tokens."""
        return self.is_last_stage and self.tp_rank == 0

    @property
    def is_dp_leader(self) -> bool:
        """Whether this rank represents its data-parallel replica."""
        return self.owns_logits and self.cp_rank == 0


def choose_device(device: Device) -> torch.device:
    """The device of this rank's policy."""
    if device is Device.cpu or (device is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise UserError(
            f"policy.device=cuda, but torch finds {torch.cuda.device_count()} GPUs on this machine and local "
            f"rank {index} needs one; set policy.device=cpu, or start fewer ranks"
        )
    return torch.device("cuda", index)


def initialize(config: Config) -> Parallel:
    """Initialize torch.distributed and Megatron's groups, under torchrun, srun, `--nproc` or alone."""
    device = choose_device(config.policy.device)
    if device.type == "cpu":
        from opo_megatron.distributed.cpu_backend import install

        _check_cpu_layout(config.policy)
        torch.set_num_threads(config.run.threads_per_rank)
        install("cpu")
    else:
        torch.cuda.set_device(device)
    # At INFO Megatron logs every object that it builds.
    logging.getLogger("megatron").setLevel(logging.WARNING)
    if not dist.is_initialized():
        _join(device, timedelta(minutes=config.run.distributed_timeout_minutes))
    return megatron_groups(config, device)


def _check_cpu_layout(policy: PolicyConfig) -> None:
    if policy.expert_model_parallel_size > 1 and (policy.expert_tensor_parallel_size or 1) > 1:
        raise UserError(
            f"policy.expert_tensor_parallel_size={policy.expert_tensor_parallel_size} with expert "
            "parallelism gathers unequal numbers of tokens, which gloo does not support; set it to 1, or use "
            "GPUs"
        )


def _join(device: torch.device, timeout: timedelta) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def megatron_groups(config: Config, device: torch.device) -> Parallel:
    """Create Megatron's groups over all ranks of the default process group.

    Without gloo groups on the meta device, where the other ranks do not exist and gloo would wait for them.
    """
    from megatron.core import parallel_state as state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    policy = config.policy
    state.initialize_model_parallel(
        policy.tensor_model_parallel_size,
        policy.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=policy.virtual_pipeline_model_parallel_size,
        context_parallel_size=policy.context_parallel_size,
        expert_model_parallel_size=policy.expert_model_parallel_size,
        expert_tensor_parallel_size=policy.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(config.run.distributed_timeout_minutes)),
        create_gloo_process_groups=device.type != "meta",
    )
    model_parallel_cuda_manual_seed(config.run.seed)
    timeout = timedelta(minutes=config.run.distributed_timeout_minutes)
    return Parallel(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        pp_rank=state.get_pipeline_model_parallel_rank(),
        pp_size=state.get_pipeline_model_parallel_world_size(),
        vpp_size=policy.virtual_pipeline_model_parallel_size or 1,
        cp_rank=state.get_context_parallel_rank(),
        cp_size=state.get_context_parallel_world_size(),
        dp_rank=state.get_data_parallel_rank(),
        dp_size=state.get_data_parallel_world_size(),
        dp_cp_rank=state.get_data_parallel_rank(with_context_parallel=True),
        dp_cp_size=state.get_data_parallel_world_size(with_context_parallel=True),
        ep_rank=state.get_expert_model_parallel_rank(),
        ep_size=state.get_expert_model_parallel_world_size(),
        edp_rank=state.get_expert_data_parallel_rank(),
        etp_rank=state.get_expert_tensor_parallel_rank(),
        etp_size=state.get_expert_tensor_parallel_world_size(),
        tp_group=state.get_tensor_model_parallel_group(),
        pp_group=state.get_pipeline_model_parallel_group(),
        cp_group=state.get_context_parallel_group(),
        ep_group=state.get_expert_model_parallel_group(),
        etp_group=state.get_expert_tensor_parallel_group(),
        expert_group=state.get_expert_tensor_and_model_parallel_group(),
        cpu_group=dist.new_group(backend=None if device.type == "meta" else "gloo", timeout=timeout),
    )


def destroy_model_parallel() -> None:
    """Destroy Megatron's groups, so that `initialize` can set up another parallel layout."""
    from megatron.core import parallel_state as state

    state.destroy_model_parallel()


def shutdown() -> None:
    """Undo `initialize`."""
    destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_range(count: int, rank: int, world_size: int) -> range:
    """The contiguous block of `count` items of `rank`; block sizes differ by at most one."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def all_gather_objects(parallel: Parallel, value: Any) -> list[Any]:
    """`value` of every rank, in rank order.  Unpickles without checks.

    One collective where all are small, which most are: its latency is what they cost on many ranks.
    """
    if parallel.world_size == 1:
        return [value]
    blob = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    own = torch.zeros(SMALL_BYTES, dtype=torch.uint8)
    own[:8].view(torch.int64)[0] = blob.numel()
    own[8 : 8 + blob.numel()] = blob[: SMALL_BYTES - 8]
    gathered = _all_gather(parallel, own)
    sizes = gathered[:, :8].contiguous().view(torch.int64)[:, 0].tolist()
    if max(sizes) <= SMALL_BYTES - 8:
        blobs = gathered[:, 8:]
    else:
        blobs = _all_gather(parallel, F.pad(blob, (0, max(sizes) - blob.numel())))
    return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(blobs, sizes, strict=True)]


def _all_gather(parallel: Parallel, own: Tensor) -> Tensor:
    """[n] of every rank → [ranks, n]."""
    gathered = own.new_empty(parallel.world_size * own.numel())
    dist.all_gather_into_tensor(gathered, own, group=parallel.cpu_group)
    return gathered.view(parallel.world_size, -1)


def all_to_all_objects(parallel: Parallel, values: list[Any]) -> list[Any]:
    """Send values[r] to every rank r; returns what each rank sent.  Unpickles without checks.

    An object that several ranks get is pickled once.
    """
    if parallel.world_size == 1:
        return values
    pickled = {id(v): torch.frombuffer(bytearray(pickle.dumps(v)), dtype=torch.uint8) for v in values}
    blobs = [pickled[id(v)] for v in values]
    sent = torch.tensor([b.numel() for b in blobs])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=parallel.cpu_group)
    buffer = torch.empty(int(received.sum()), dtype=torch.uint8)
    dist.all_to_all_single(
        buffer, torch.cat(blobs), received.tolist(), sent.tolist(), group=parallel.cpu_group
    )
    return [pickle.loads(part.numpy().tobytes()) for part in buffer.split(received.tolist())]


def gather_tokens(parallel: Parallel, values: Tensor, token_indices: Tensor, total: int) -> Tensor:
    """Gather per-token values over context-parallel ranks: [n, …] on each → [total, …] on all.

    Args:
        token_indices: [n] indices of this rank's tokens among `total`; every token is on one rank.
    """
    if parallel.cp_size == 1:
        return values
    gathered = values.new_zeros(total, *values.shape[1:])
    gathered[token_indices] = values
    dist.all_reduce(gathered, group=parallel.cp_group)
    return gathered


def all_reduce(parallel: Parallel, values: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """`values` (on the CPU) reduced over all ranks, in place."""
    if parallel.world_size > 1:
        dist.all_reduce(values, op=operation, group=parallel.cpu_group)
    return values
