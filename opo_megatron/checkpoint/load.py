"""Load a checkpoint of any parallel layout into a policy and its optimizer."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron.core import dist_checkpointing

from opo_megatron.checkpoint.contents import model_of, optimizer_of, sharded_state, wrapped_errors
from opo_megatron.checkpoint.progress import read_run_state
from opo_megatron.config import Config
from opo_megatron.distributed.megatron_versions import adopt_rates, groups_in, unreadable_reason
from opo_megatron.errors import UserError
from opo_megatron.policy.policy import Policy


def load(policy: Policy, config: Config, path: Path) -> None:
    """Set weights, optimizer and version from a checkpoint of any parallel layout.

    Raises:
        UserError: when `path` is not a checkpoint, is damaged, or is one of another model or optimizer.
    """
    state = read_run_state(path)
    for name, value in model_of(policy, config).items():
        saved = state["model"].get(name)
        if saved != value:
            raise UserError(
                f"the checkpoint {path} holds a model with {name}={saved}, but this run's has "
                f"{name}={value}; use the recipe that it was trained with"
            )
    for name, value in optimizer_of(config).items():
        if state["optimizer"][name] != value:
            raise UserError(
                f"the checkpoint {path} holds an optimizer with {name}={state['optimizer'][name]}, but this "
                f"run has {value}; set policy.distributed_optimizer and expert parallelism as they were"
            )
    if (reason := unreadable_reason(path)) is not None:
        raise UserError(f"the checkpoint {path} {reason}")
    policy.allocate_optimizer_state()
    with wrapped_errors(
        f"the checkpoint {path} is damaged",
        "resume from another one (resume=auto takes the newest: move this one away)",
    ):
        loaded = dist_checkpointing.load(sharded_state(policy, is_loading=True), str(path))
        for i, chunk in enumerate(policy.chunks):
            chunk.load_state_dict(loaded[f"model{i}"])
        adopt_rates(list(groups_in(loaded["optimizer"])), policy.optimizer.param_groups)
        policy.optimizer.load_state_dict(loaded["optimizer"])
    policy.version = state["version"]


def _ignore_optimizer_shard_warning() -> None:
    """Suppress Megatron's warning about the empty `param_state` that it writes itself on ranks above 0."""
    logging.getLogger("megatron.core.dist_checkpointing.validation").addFilter(
        lambda record: "('optimizer', 'param_state')" not in record.getMessage()
    )


_ignore_optimizer_shard_warning()
