"""What of the policy's memory an engine on the same GPUs may have while it takes weights and draws.

Tensors keep their identity: only the storage behind them is given back and comes again, so Megatron's
buffers, views and optimizer states never notice.  The same code runs on a CPU, where it saves nothing
but can be tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from opo_megatron.policy.policy import Policy


class PolicyMemory:
    """Gradients, which are dropped, and master weights with moments, which wait in host memory."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._on_gpu = policy.parallel.device.type == "cuda"
        self._without_gradients = False
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._hosts: dict[int, Tensor] = {}
        """Host memory by size, kept from step to step: page-locked memory takes long to get."""

    @property
    def is_complete(self) -> bool:
        """Whether the policy can train."""
        return not self._without_gradients and not self._away

    def free_gradients(self) -> None:
        """Give back the gradient buffers; what they hold is lost."""
        if self._without_gradients or self._policy.optimizer is None:
            return
        for chunk in self._policy.ddp_chunks:
            chunk.offload_grad_buffers(synchronize=self._on_gpu, empty_cache=self._on_gpu)
        self._without_gradients = True

    def offload_optimizer(self) -> None:
        """Bring master weights and moments to host memory."""
        if self._away or self._policy.optimizer is None:
            return
        free = list(self._hosts.values())
        self._hosts = {}
        for storage in self._optimizer_storages():
            host = self._host_memory(storage.nbytes(), free)
            host.copy_(_bytes_of(storage))
            self._away.append((storage, host))
        for storage, _ in self._away:
            storage.resize_(0)
        if self._on_gpu:
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Make the policy complete again, bit for bit, with gradients of zero."""
        for storage, host in self._away:
            storage.resize_(host.numel())
            _bytes_of(storage).copy_(host)
            self._hosts[host.data_ptr()] = host
        self._away = []
        if self._without_gradients:
            for chunk in self._policy.ddp_chunks:
                chunk.restore_grad_buffers(synchronize=self._on_gpu)
            self._without_gradients = False

    def _host_memory(self, size: int, free: list[Tensor]) -> Tensor:
        for i, host in enumerate(free):
            if host.numel() == size:
                return free.pop(i)
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu)

    def _optimizer_storages(self) -> Iterator[torch.UntypedStorage]:
        """Those of the optimizer alone: where there are no master weights, it works on the model's own."""
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
