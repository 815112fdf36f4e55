"""What a checkpoint holds: Megatron's sharded state, and the properties that must agree when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from opo_megatron.checkpoint.optimizer_state import gather_leanly
from opo_megatron.config import Config
from opo_megatron.errors import UserError
from opo_megatron.policy.policy import Policy

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gather on one rank of each replica, by way of the host, instead of everywhere.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def model_of(policy: Policy, config: Config) -> dict[str, Any]:
    """What must agree; the longest sequence is no property of the weights."""
    model = asdict(config.policy.model) | {"vocab_size": policy.vocab_size}
    del model["max_sequence_length"]
    return model


def optimizer_of(config: Config) -> dict[str, Any]:
    """What the optimizer's state is made of, apart from the layout: Megatron cannot convert it."""
    policy = config.policy
    return {
        "distributed_optimizer": policy.distributed_optimizer,
        "separate_experts": policy.expert_model_parallel_size > 1,
    }


def sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = dict(_METADATA)
    state: dict[str, Any] = {
        f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(policy.chunks)
    }
    gather_leanly(policy.optimizer)
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


@contextmanager
def named_failures(what: str, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Megatron and torch raise many kinds of errors for a file that is cut short or cannot be written."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        cause = next((rank[0] for rank in getattr(error, "failures", {}).values()), error)
        reason = next(iter(str(cause).splitlines()), "")[:200]
        raise kind(f"{what} ({type(cause).__name__}: {reason}); {remedy}") from error
