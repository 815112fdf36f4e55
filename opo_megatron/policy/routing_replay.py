"""Routing replay: the policy's routers send every token to the experts that the engine took.

With experts a rounding difference does not stay small.  Where the scores of two experts are nearly equal,
engine and policy may choose different ones, and the token's log-probability jumps.  So the rollouts carry
the engine's choice, and Megatron's `RouterReplay` puts it in place of the router's own top-k.  The weights of
the chosen experts are the softmax of the router's own scores at them, so that the router's gradient flows as
if it had chosen them itself.

A router works on tokens in the order of Megatron's hidden states, [s, b] flattened, of which a
sequence-parallel rank has its contiguous part.  Layers that are recomputed in the backward pass take their
experts from a queue per router, in the order of the forward passes, which is that of the backward passes
under every pipeline schedule.

Rollouts without the column (demonstrations, `rollout.routing_replay=false`) leave the choice to the routers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.schema import ModelConfig

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    from opo_megatron.distributed.process_groups import Parallel


class RoutingReplay:
    """The routers of this rank's model chunks, and what they replay."""

    def __init__(self, chunks: Sequence[GPTModel], config: TransformerConfig, parallel: Parallel) -> None:
        self._routers = [[m for m in chunk.modules() if isinstance(m, TopKRouter)] for chunk in chunks]
        modules = config.recompute_modules or ()
        self._recomputes = config.recompute_granularity == "full" or "moe" in modules
        self._tokens = (parallel.tp_rank, parallel.tp_size) if config.sequence_parallel else (0, 1)

    @contextmanager
    def forward(self, chunk: int, routed_experts: Tensor | None) -> Iterator[None]:
        """Within this context the forward pass of a chunk takes the experts of its micro-batch.

        Args:
            routed_experts: `MicroBatch.routed_experts`; None leaves the choice to the routers.
        """
        if routed_experts is None:
            yield
            return
        rank, size = self._tokens
        own = routed_experts.transpose(0, 1).chunk(size)[rank].flatten(0, 1)  # [tokens, layers, k]
        keeps = self._recomputes and torch.is_grad_enabled()
        for router in self._routers[chunk]:
            replay: Any = router.router_replay
            replay.set_target_indices(own[:, router.layer_number - 1].long())
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
        for router in self._routers[chunk]:
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            if not keeps:  # else the indices of all micro-batches would stay until the end
                router.router_replay.clear_indices()

    def clear(self) -> None:
        """Forget all experts after a pass, or a failed one: the routers choose again."""
        for router in (router for chunk in self._routers for router in chunk):
            router.router_replay.clear_indices()
            router.router_replay.clear_router_replay_action()


def check_routed_experts(rollouts: Rollouts, model: ModelConfig) -> None:
    """Check that recorded experts are of such a model.

    Raises:
        ValueError: for another number of tokens, layers or experts, or an expert that does not exist.
    """
    experts = rollouts.routed_experts
    if experts is None:
        return
    tokens = int(rollouts.input_lengths.sum())
    count = model.num_moe_experts or 0
    expected = (tokens, model.num_layers, model.moe_router_topk if count else 0)
    if tuple(experts.shape) != expected:
        raise ValueError(
            f"the rollouts' routed experts have the shape {tuple(experts.shape)}, where the model has "
            f"{expected} (tokens, layers, experts per token)"
        )
    bounds = experts.aminmax() if experts.numel() else ()
    for expert in map(int, bounds):
        if not 0 <= expert < count:
            raise ValueError(f"the rollouts name expert {expert}, but the model has {count} per layer")
