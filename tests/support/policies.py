"""A Megatron policy in this process, and its gradients by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from opo_megatron.config import Config
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.policy.policy import Policy
from tests.support.fixtures import small_config, small_policy


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
