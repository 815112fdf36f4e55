"""Contents of a checkpoint: Megatron's sharded state, and the properties that must match at loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from opo_megatron.checkpoint.optimizer_state import use_lean_gather
from opo_megatron.config import Config
from opo_megatron.errors import UserError
from opo_megatron.policy.policy import Policy

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gather on one rank of each replica, on the host, instead of on all ranks.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def model_of(policy: Policy, config: Config) -> dict[str, Any]:
    """Model properties that must match; max_sequence_length does not affect the weights."""
    model = asdict(config.policy.model) | {"vocab_size": policy.vocab_size}
    del model["max_sequence_length"]
    return model


def optimizer_of(config: Config) -> dict[str, Any]:
    """Optimizer settings that must match: Megatron cannot convert between them."""
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
    use_lean_gather(policy.optimizer)
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


@contextmanager
def wrapped_errors(what: str, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn the many errors of Megatron and torch about unreadable or unwritable files into `kind`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
        cause = next((rank[0] for rank in getattr(error, "failures", {}).values()), error)
        reason = next(iter(str(cause).splitlines()), "")[:200]
        raise kind(f"{what} ({type(cause).__name__}: {reason}); {remedy}") from error
