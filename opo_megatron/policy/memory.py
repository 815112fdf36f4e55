"""Offloading the policy's memory for an engine on the same GPUs, during weight updates and generation.

Tensors keep their identity: only their storage is freed and allocated again, so Megatron's buffers, views
and optimizer states stay valid.  The same code runs on a CPU, where it saves nothing but can be tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from opo_megatron.policy.policy import Policy


class PolicyMemory:
    """Frees gradients, and offloads master weights and moments to host memory."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._on_gpu = policy.parallel.device.type == "cuda"
        self._gradients_freed = False
        self._offloaded: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._host_buffers: dict[int, Tensor] = {}
        """Host buffers by address, kept from step to step: page-locked memory is slow to allocate."""

    @property
    def is_complete(self) -> bool:
        """Whether everything is on the device, so that the policy can train."""
        return not self._gradients_freed and not self._offloaded

    def free_gradients(self) -> None:
        """Free the gradient buffers; their content is lost."""
        if self._gradients_freed or self._policy.optimizer is None:
            return
        for chunk in self._policy.ddp_chunks:
            chunk.offload_grad_buffers(synchronize=self._on_gpu, empty_cache=self._on_gpu)
        self._gradients_freed = True

    def make_room(self) -> None:
        """Free all that an engine may use: gradients, the optimizer, and what torch's allocator keeps."""
        self.free_gradients()
        self.offload_optimizer()
        self.release_cached()

    def release_cached(self) -> None:
        """Give back memory that is free, but that torch's allocator keeps: an engine cannot take that.

        Every sync leaves buckets and the probe's activations there, whether or not anything is offloaded.
        Buckets that were shared by CUDA IPC count as used until they are collected.
        """
        if self._on_gpu:
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def offload_optimizer(self) -> None:
        """Move master weights and moments to host memory."""
        if self._offloaded or self._policy.optimizer is None:
            return
        free = list(self._host_buffers.values())
        self._host_buffers = {}
        for storage in self._optimizer_storages():
            host = self._host_memory(storage.nbytes(), free)
            host.copy_(_bytes_of(storage))
            self._offloaded.append((storage, host))
        for storage, _ in self._offloaded:
            storage.resize_(0)

    def reload(self) -> None:
        """Restore everything bit for bit, with zero gradients."""
        for storage, host in self._offloaded:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host)
            self._host_buffers[host.data_ptr()] = host
        self._offloaded = []
        if self._gradients_freed:
            for chunk in self._policy.ddp_chunks:
                chunk.restore_grad_buffers(synchronize=self._on_gpu)
            self._gradients_freed = False

    def _host_memory(self, size: int, free: list[Tensor]) -> Tensor:
        for i, host in enumerate(free):
            if host.numel() == size:
                return free.pop(i)
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def _optimizer_storages(self) -> Iterator[torch.UntypedStorage]:
        """Storages of the optimizer alone: without master weights, its parameters are the model's own."""
        seen = {p.untyped_storage().data_ptr() for chunk in self._policy.chunks for p in chunk.parameters()}
        optimizers = getattr(self._policy.optimizer, "chained_optimizers", [self._policy.optimizer])
        for one in optimizers:
            inner = one.optimizer
            states = [value for state in inner.state.values() for value in state.values()]
            masters = [parameter for group in inner.param_groups for parameter in group["params"]]
            for value in (*masters, *states):
                if not isinstance(value, Tensor) or value.device.type != self._policy.parallel.device.type:
                    continue
                storage = value.untyped_storage()
                if storage.nbytes() and storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    yield storage


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload,no-any-return]
