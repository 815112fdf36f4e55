"""Colocated policy and engine: they use the memory of the same GPUs in turn.

One step, in this order:

    policy frees its gradients → engine allocates weights → weights are streamed
    → policy offloads its optimizer to the host → engine allocates its KV cache → rollouts, evaluation
    → engine releases both → policy reloads everything → training

so the peak is the larger of the two (plus two copies of the weights).  Every rank of the engine's group must
have released its memory before the engine allocates, hence the barriers.  What torch's allocator keeps for
later is released too, at every turn: an engine that restarts finds an optimizer that is offloaded already.

At each turn, the memory of either side is measured (`metrics`): this process's, and the rest of what is in
use on its GPU, which is the engine's where nothing else runs there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import EngineFailure
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import RolloutEngine


class MemorySharing:
    """Moves memory between policy and engine; does nothing where they are not colocated."""

    def __init__(self, policy: Policy, engine: RolloutEngine, parallel: Parallel, is_enabled: bool) -> None:
        self._policy, self._engine, self._parallel, self.is_enabled = policy, engine, parallel, is_enabled
        self.metrics: MetricsRow = {}
        """GiB on this rank's GPU at the last turn of each kind, by the metrics' names."""

    def before_update(self) -> None:
        """Make room for the engine's weights, which `update_weights` allocates."""
        if self.is_enabled:
            self._policy.memory.free_gradients()
            self._policy.memory.release_cached()
            self._barrier()

    def after_update(self) -> None:
        """Make room for the engine's KV cache; called after a failed update too."""
        if self.is_enabled:
            self._measure("sync")
            self._policy.memory.offload_optimizer()
            self._policy.memory.release_cached()
            self._barrier()

    def before_restart(self) -> None:
        """Make room for a server that may restart: it takes what it finds free."""
        if self.is_enabled:
            self._policy.memory.make_room()
            self._barrier()

    def before_rollout(self) -> None:
        """The engine allocates all its memory.

        Raises:
            EngineFailure: where that fails.
        """
        if self.is_enabled:
            self._engine.wake()
            self._measure("rollout")

    def before_training(self) -> None:
        """The engine releases its memory, and the policy reloads everything."""
        if self.is_enabled:
            self._put_engine_to_sleep(keeps_weights=False)
            self._policy.memory.reload()
            self._measure("train")

    @contextmanager
    def saving(self) -> Iterator[None]:
        """For saving a checkpoint: the optimizer is reloaded while the engine keeps its weights."""
        if not self.is_enabled or self._policy.memory.is_complete:
            yield
            return
        self._put_engine_to_sleep(keeps_weights=True)
        self._policy.memory.reload()
        yield
        self._policy.memory.make_room()
        self._barrier()
        with suppress(EngineFailure):  # the next rollout notices it and restarts the engine
            self._engine.wake()

    def _put_engine_to_sleep(self, keeps_weights: bool) -> None:
        with suppress(EngineFailure):  # a dead engine holds no memory; the next sync notices it
            self._engine.sleep(keeps_weights)
        self._barrier()

    def _measure(self, phase: str) -> None:
        """What each side holds at the beginning of a phase; of `sync`, at its end."""
        if (used := gpu_bytes(self._parallel.device)) is not None:
            own, others = used
            self.metrics[f"memory/policy_{phase}_gpu_gib"] = own / 2**30
            self.metrics[f"memory/engine_{phase}_gpu_gib"] = others / 2**30

    def _barrier(self) -> None:
        all_gather_objects(self._parallel, None)


def gpu_bytes(device: torch.device) -> tuple[int, int] | None:
    """Bytes of a GPU that this process's allocator has, and all others in use; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    return own, total - free - own
