"""The cases `moe-replay-…` of `tools/check_layouts.py`: an engine's experts, replayed under each layout.

The experts are those that a decoder takes whose routers are far from the policy's, so that the policy's own
choice would be another one for most tokens.  What the policy computes with them is compared with a second
decoder, which has the policy's weights and is given the same experts.  Weights stay as they are: the steps
have a learning rate of 0, so that every step compares its gradient with nothing but rounding.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts, experts_dtype
from opo_megatron.config.choices import Dtype
from opo_megatron.distributed.process_groups import all_reduce
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.local.decoder import Decoder, KeyValueCache
from opo_megatron.weights.random_init import random_weights
from opo_megatron.weights.stream import WeightSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opo_megatron.config import Config
    from opo_megatron.distributed.process_groups import Parallel

TEMPERATURE = 0.8
ROUTER_NOISE = 1.0
"""Standard deviation of what is added to the routers that choose the experts, relative to their own."""


class GivenExperts(Decoder):
    """A decoder whose tokens go where `given` [b, s, layers, k] says."""

    given: Tensor | None = None

    def _choose(self, scores: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if self.given is None:
            return super()._choose(scores, layer)
        chosen = self.given[:, :, layer].flatten(0, 1).long()
        return scores.gather(1, chosen), chosen


def perturbed(source: WeightSource, noise: float = ROUTER_NOISE) -> WeightSource:
    """The same weights with other routers."""

    def read(name: str) -> Tensor:
        tensor = source(name)[:]
        if not name.endswith("mlp.gate.weight"):
            return tensor
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return tensor + torch.randn(tensor.shape, generator=generator) * tensor.std() * noise

    return read


def decoder_of(config: Config, vocab_size: int, device: torch.device, weights: WeightSource) -> GivenExperts:
    """A decoder of the recipe's model with `weights`."""
    dtype = torch.bfloat16 if config.policy.dtype is Dtype.bf16 else torch.float32
    decoder = GivenExperts(config.policy.model, vocab_size, dtype, device)
    for name in decoder.names():
        decoder.load(name, weights(name)[:])
    return decoder


@torch.no_grad()
def forward(decoder: GivenExperts, rollouts: Rollouts, temperature: float) -> tuple[Tensor, Tensor]:
    """log π_T of the responses [Σl], and the experts [Σ(p + l − 1), layers, k]; one sequence at a time."""
    log_probs, experts = [], []
    given = None
    if rollouts.routed_experts is not None:
        given = rollouts.routed_experts.split(rollouts.input_lengths.tolist())
    row = torch.tensor([0], device=decoder.device)
    for i, sequence in enumerate(rollouts.sequences()):
        tokens = sequence[:-1].unsqueeze(0).to(decoder.device)
        cache = KeyValueCache(decoder.model, 1, tokens.shape[1], decoder.dtype, decoder.device)
        decoder.given = None if given is None else given[i].unsqueeze(0).to(decoder.device)
        decoder.routed_experts = []
        hidden = decoder.prefill(tokens, cache, row, row)[0]
        experts.append(torch.stack(decoder.routed_experts, 2)[0].cpu())
        first = int(rollouts.prompt_lengths[i]) - 1
        found = (decoder.logits(hidden[first:]).float() / temperature).log_softmax(-1)
        targets = sequence[first + 1 :].unsqueeze(1).to(decoder.device)
        log_probs.append(found.gather(1, targets)[:, 0].cpu())
    return torch.cat(log_probs), torch.cat(experts)


def replayed_steps(
    config: Config, parallel: Parallel, vocab_size: int, batches: Sequence[Rollouts], replays: bool
) -> list[list[float]]:
    """[loss, grad norm, max |Δ log π| to the decoder with the same experts] for each batch.

    Args:
        replays: False leaves the choice to the policy's routers, which must differ.
    """
    model = config.policy.model
    assert model.num_moe_experts is not None
    weights = random_weights(model, vocab_size, config.run.seed)
    engine = decoder_of(config, vocab_size, parallel.device, perturbed(weights))
    judge = decoder_of(config, vocab_size, parallel.device, weights)
    policy = Policy(config, vocab_size, parallel, config.optimizer, weights)
    results = []
    for rollouts in batches:
        _, experts = forward(engine, rollouts, TEMPERATURE)
        rollouts.routed_experts = experts.to(experts_dtype(model.num_moe_experts))
        rollouts.engine_log_prob, _ = forward(judge, rollouts, TEMPERATURE)
        if not replays:
            rollouts.routed_experts = None
        schedule = policy.schedule(rollouts.sequence_lengths)
        own = rollouts.select(schedule.samples_of(parallel.dp_rank))
        assert own.engine_log_prob is not None
        difference = (policy.log_probs(own, schedule, TEMPERATURE) - own.engine_log_prob).abs()
        most = torch.tensor([float(difference.max()) if difference.numel() else 0.0])
        all_reduce(parallel, most, dist.ReduceOp.MAX)
        # As in training with several ranks, samples without a gradient run forward only.
        assert rollouts.advantages is not None
        zero_advantage = rollouts.advantages == 0 if parallel.world_size > 1 else None
        schedule = policy.schedule(rollouts.sequence_lengths, zero_advantage)
        own = rollouts.select(schedule.samples_of(parallel.dp_rank))
        objective = PolicyGradient(float(rollouts.response_lengths.sum()), TEMPERATURE)
        metrics = policy.train_step(own, schedule, objective, lr=0.0)
        results.append([metrics.loss, metrics.grad_norm, float(most)])
    return results
