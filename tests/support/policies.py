"""A Megatron policy in this process, and its gradients by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.policy.policy import Policy
from opo_megatron.weights.random_init import random_weights
from tests.support.fixtures import VOCAB_SIZE, small_config, small_policy


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


def make_policy(parallel: Parallel, *overrides: str) -> tuple[Policy, Config]:
    config = small_config(*overrides)
    return small_policy(config, parallel), config


def gradients_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Accumulated gradients under Hugging Face names."""
    named = {}
    for parameter in policy.param_mapping:
        gradient = policy.chunks[0].get_parameter(parameter.mcore_name).main_grad
        names = [name for name, _ in parameter.tensors[0]]
        named |= dict(zip(names, parameter.sharding.join([gradient]), strict=True))
    return named


def make_exact(
    parallel: Parallel, *overrides: str, exact: bool = True, precision: tuple[str, ...] = ()
) -> tuple[Config, Policy]:
    """A policy whose next-token distributions are far from uniform."""
    model = (f"policy.model.{override}" for override in overrides)
    config = small_config(f"rollout.local.exact={exact}", *model, *precision)
    source = random_weights(config.policy.model, VOCAB_SIZE, config.run.seed)
    generator = torch.Generator().manual_seed(4)

    def weights(name: str) -> Tensor:
        tensor = source(name)
        if tensor.dim() == 1:
            return tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        return tensor * 4

    return config, Policy(config, VOCAB_SIZE, parallel, config.optimizer, weights)


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """The policy's weights by Hugging Face name."""
    return {name: tensor.clone() for bucket in policy.stream_weights() for name, tensor in bucket}
