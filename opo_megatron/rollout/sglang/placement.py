"""Which ranks share a managed server, and on which devices it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from opo_megatron.config.rollout import SglangConfig
from opo_megatron.errors import UserError


def servers_per_node(settings: SglangConfig, device: torch.device) -> int:
    """Managed servers of each node."""
    if device.type == "cpu":
        return settings.servers or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return settings.servers or max(1, local // settings.tensor_parallel_size)


def visible_gpus(device: torch.device, ranks: int) -> list[str] | None:
    """The devices of as many ranks, from `device` on, as CUDA_VISIBLE_DEVICES names them."""
    if device.type == "cpu":
        return None
    first = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(first + ranks)]
    return names[first : first + ranks]


def server_group(hosts: Sequence[str], rank: int, servers_per_node: int) -> list[int]:
    """The ranks that share `rank`'s server: equal contiguous parts of its node's ranks.

    Args:
        hosts: name of each rank's node.

    Raises:
        UserError: where the node's ranks do not divide evenly.
    """
    local = [r for r, host in enumerate(hosts) if host == hosts[rank]]
    if len(local) % servers_per_node:
        raise UserError(
            f"rollout.sglang.servers={servers_per_node} does not divide the {len(local)} ranks of a node; "
            "choose a divisor"
        )
    size = len(local) // servers_per_node
    first = local.index(rank) // size * size
    return local[first : first + size]
