"""One rank: outputs of the LM head, energies and gradient inner products under several parallel layouts.

    algorithm_worker.py OUTPUT [override,override …]…

Rank 0 writes a list of dicts of lists, one per layout, for `test_algorithm_layouts.py` to compare.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import Parallel, destroy_model_parallel, initialize, shutdown
from opo_megatron.kernels.lm_head import VocabularyShard, chunked_logprobs
from opo_megatron.policy import per_sample
from opo_megatron.policy.policy import Policy
from opo_megatron.policy.token_measures import measure_energies
from opo_megatron.weights.stream import ModelShards, stream_weights
from tests.support.conversations import ragged_conversations
from tests.support.fixtures import ragged_rollouts, small_config, small_policy

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
TEMPERATURE = 0.7
CONVERSATIONS = "OPO_TEST_CONVERSATIONS"
"""Set in the environment: the samples are conversations."""
HEAD_SHAPES = ((1, 4, 7), (37, 16, 43), (130, 24, 599))
"""(tokens, hidden, vocabulary); the vocabulary is sharded over ranks, the last rank may hold fewer rows."""


def batch_of() -> Rollouts:
    rollouts = ragged_conversations() if CONVERSATIONS in os.environ else ragged_rollouts()
    generator = torch.Generator().manual_seed(1)
    rollouts.advantages = torch.randn(len(rollouts), generator=generator, dtype=torch.float64)
    rollouts.advantages[::5] = 0
    return rollouts


class GradientShards(ModelShards):
    """A policy's gradients instead of its weights, so that the weight stream gathers them."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.chunks)
        self._policy = policy

    def read(self, parameter: Any) -> Tensor:
        chunk = self._policy.chunks[parameter.chunk]
        gradient: Tensor = chunk.get_parameter(parameter.mcore_name).main_grad  # type: ignore[assignment]
        return gradient


def measure(overrides: list[str], parallel: Parallel) -> dict[str, Any]:
    """Collective; gradients only where each data-parallel rank holds them unsharded."""
    config = small_config(*overrides, "optimizer.clip=0", world_size=WORLD_SIZE)
    policy = small_policy(config, parallel)
    rollouts, total = batch_of(), len(ragged_rollouts())
    results: dict[str, Any] = {}

    schedule = policy.schedule(rollouts.sequence_lengths)
    batch = rollouts.select(schedule.samples_of(parallel.dp_rank))
    sums = measure_energies(policy, batch, schedule, total, TEMPERATURE)
    results["energy"], results["energy_hidden"] = sums.energy.tolist(), sums.energy_hidden.tolist()

    replicated = policy.schedule_replicated(rollouts.sequence_lengths, list(range(8)))
    chosen = rollouts.select(replicated.samples_of(parallel.dp_rank))
    order = torch.tensor(replicated.samples_of(parallel.dp_rank)).argsort()
    for name, of in (("output", per_sample.output_layer), ("all", per_sample.all_parameters)):
        result = of(policy, chosen, replicated, TEMPERATURE)
        results[f"gram_{name}"] = result.gram[order][:, order].tolist()
        results[f"gram_{name}_energy"] = result.energies.energy[order].tolist()

    if parallel.dp_size == 1 and (parallel.dp_cp_size == 1 or not config.policy.distributed_optimizer):
        objective = PolicyGradient(100.0, TEMPERATURE)
        schedule = policy.schedule(rollouts.sequence_lengths, rollouts.advantages == 0)
        policy.checked_gradients(rollouts.select(schedule.samples_of(0)), schedule, objective)
        stream = stream_weights(GradientShards(policy), policy.param_mapping, parallel, 2**20)
        results["gradients"] = {name: tensor.clone() for bucket in stream for name, tensor in bucket}
    if parallel.tp_size == WORLD_SIZE:
        results["head"] = [head(shape, parallel) for shape in HEAD_SHAPES]
    return results


def head_inputs(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    tokens, hidden, rows = shape
    generator = torch.Generator().manual_seed(tokens)
    return {
        "hidden": torch.randn(tokens, hidden, generator=generator),
        "weight": torch.randn(rows, hidden, generator=generator),
        "targets": torch.randint(rows, (tokens,), generator=generator),
        "advantages": torch.randn(tokens, generator=generator),
    }


def head(shape: tuple[int, int, int], parallel: Parallel) -> dict[str, Tensor]:
    """`chunked_logprobs` on this rank's vocabulary shard; d_hidden and d_weight of the whole vocabulary."""
    inputs = head_inputs(shape)
    rows = -(-shape[2] // parallel.tp_size)  # the last rank has fewer
    start = rows * parallel.tp_rank
    weight = inputs["weight"][start : start + rows]
    d_weight = torch.zeros_like(weight)

    def coefficient(log_prob: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        advantages = inputs["advantages"][part]
        return -advantages * log_prob + 0.1 * log_prob**2, -advantages + 0.2 * log_prob

    group = parallel.tp_group if parallel.tp_size > 1 else None
    place = VocabularyShard(start, group)
    output = chunked_logprobs(
        inputs["hidden"], weight, inputs["targets"], place, 1.3, 16, coefficient, d_weight
    )
    assert output.d_hidden is not None and output.loss is not None
    whole = torch.zeros_like(inputs["weight"])
    whole[start : start + rows] = d_weight
    if group is not None:
        dist.all_reduce(output.d_hidden, group=group)
        dist.all_reduce(whole, group=group)
    return {
        "log_prob": output.log_prob,
        "entropy": output.entropy,
        "sum_squares": output.sum_squares,
        "loss": output.loss,
        "d_hidden": output.d_hidden,
        "d_weight": whole,
    }


def main() -> None:
    output, layouts = Path(sys.argv[1]), [a.split(",") if a else [] for a in sys.argv[2:]]
    results = []
    for overrides in layouts:
        parallel = initialize(small_config(*overrides, world_size=WORLD_SIZE))
        results.append(measure(overrides, parallel))
        destroy_model_parallel()
    if dist.get_rank() == 0:
        torch.save(results, output)
    shutdown()


if __name__ == "__main__":
    main()
