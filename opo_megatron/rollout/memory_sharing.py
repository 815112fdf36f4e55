"""Policy and engine on the same GPUs take turns with memory.

One step, in this order:

    policy frees its gradients → engine gets memory for weights → weights are streamed
    → policy moves its optimizer to the host → engine gets memory for keys and values → rollouts, evaluation
    → engine gives up both → policy takes everything back → training

so that no moment holds more than the larger of both (weights in two copies besides).  Every rank of
the engine's group must have given up its part before the engine asks for it, hence the barriers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import EngineFailure
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import RolloutEngine


class MemorySharing:
    """Who holds memory when; does nothing where policy and engine have memory of their own."""

    def __init__(self, policy: Policy, engine: RolloutEngine, parallel: Parallel, is_enabled: bool) -> None:
        self._policy, self._engine, self._parallel, self.is_enabled = policy, engine, parallel, is_enabled

    def before_update(self) -> None:
        """The engine will need memory for weights, for which `update_weights` asks."""
        if self.is_enabled:
            self._policy.memory.free_gradients()
            self._wait_for_all()

    def after_update(self) -> None:
        """The engine will need memory for keys and values, too; called also where an update failed."""
        if self.is_enabled:
            self._policy.memory.offload_optimizer()
            self._wait_for_all()

    def before_rollout(self) -> None:
        """The engine takes all the memory that it needs.

        Raises:
            EngineFailure: where it cannot.
        """
        if self.is_enabled:
            self._engine.wake()

    def before_training(self) -> None:
        """The policy needs all of its memory."""
        if self.is_enabled:
            self._engine_sleeps(keeps_weights=False)
            self._policy.memory.reload()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A checkpoint, for which the optimizer comes back while the engine keeps its weights."""
        if not self.is_enabled or self._policy.memory.is_complete:
            yield
            return
        self._engine_sleeps(keeps_weights=True)
        self._policy.memory.reload()
        yield
        self._policy.memory.free_gradients()
        self.after_update()
        with suppress(EngineFailure):  # the next draw finds out and starts it again
            self._engine.wake()

    def _engine_sleeps(self, keeps_weights: bool) -> None:
        with suppress(EngineFailure):  # an engine that is gone holds no memory; the next sync finds out
            self._engine.sleep(keeps_weights)
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        all_gather_objects(self._parallel, None)
