"""Memory that the policy offloads for an engine is restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.policy.policy import Policy
from opo_megatron.weights.random_init import random_weights
from tests.support.fixtures import VOCAB_SIZE, ragged_rollouts, small_config, small_policy


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


def train(policy: Policy, seed: int) -> None:
    batch = ragged_rollouts(seed=seed)
    batch.advantages = batch.rewards - 0.5
    schedule = policy.schedule(batch.sequence_lengths)
    policy.train_step(batch.select(schedule.samples_of(0)), schedule, PolicyGradient(100.0, 1.0), 1e-2)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for bucket in policy.stream_weights() for name, tensor in bucket}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", ["true", "false"])
def test_offloading_memory_changes_nothing(parallel: Parallel, dtype: str, distributed: str) -> None:
    config = small_config(f"policy.dtype={dtype}", f"policy.distributed_optimizer={distributed}")
    plain, offloading = small_policy(config, parallel), small_policy(config, parallel)
    for seed in range(3):
        train(plain, seed)
        train(offloading, seed)
        before = sum(storage.nbytes() for storage in offloading.memory._optimizer_storages())
        offloading.memory.free_gradients()
        offloading.memory.offload_optimizer()
        assert before > 0 and sum(s.nbytes() for s in offloading.memory._optimizer_storages()) == 0
        buffers = [b.grad_data for chunk in offloading.ddp_chunks for b in chunk.buffers]
        assert all(buffer.untyped_storage().nbytes() == 0 for buffer in buffers)
        actual, expected = weights(offloading), weights(plain)  # while offloaded
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
        if seed == 1:
            offloading.memory.reload()
            assert offloading.memory.is_complete


def test_training_reloads_offloaded_memory(parallel: Parallel) -> None:
    policy = small_policy(small_config(), parallel)
    policy.memory.free_gradients()
    policy.memory.offload_optimizer()
    assert not policy.memory.is_complete
    train(policy, 0)
    assert policy.memory.is_complete


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_frozen_policy_computes_the_same_and_releases_nothing(parallel: Parallel, dtype: str) -> None:
    config = small_config(f"policy.dtype={dtype}")
    training = small_policy(config, parallel)
    source = random_weights(config.policy.model, VOCAB_SIZE, config.run.seed)
    frozen = Policy(config, VOCAB_SIZE, parallel, None, source)
    frozen.memory.free_gradients()
    frozen.memory.offload_optimizer()
    assert frozen.optimizer is None and frozen.memory.is_complete
    batch = ragged_rollouts()
    schedule = training.schedule(batch.sequence_lengths)
    actual, expected = (
        policy.log_probs(batch.select(schedule.samples_of(0)), schedule, 1.0) for policy in (frozen, training)
    )
    assert torch.equal(actual, expected)
    assert not any(parameter.grad is not None for parameter in frozen.chunks[0].parameters())
