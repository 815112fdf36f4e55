"""Whether servers can do what the recipe sets, on these devices and as they were started."""

from __future__ import annotations

import torch

from opo_megatron.config.choices import Transport
from opo_megatron.config.rules.sglang import (
    NO_DETERMINISTIC_CPU,
    NO_EXPERT_PARALLEL_CPU,
    expert_parallel_option,
)
from opo_megatron.config.rules.weight_layout import expert_ranks
from opo_megatron.config.schema import Config, SglangConfig
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.transfer import group_backend


def check_servers_device(settings: SglangConfig, device: torch.device) -> None:
    """Check that servers on the trainer's devices can do what the recipe sets.

    Raises:
        UserError: for NCCL, deterministic inference or distributed experts on a CPU.
    """
    if settings.transport is Transport.distributed:
        group_backend(settings.distributed_backend, device)
    if settings.deterministic and not settings.urls and device.type == "cpu":
        raise UserError(NO_DETERMINISTIC_CPU.format("and this run is on a CPU"))
    option = expert_parallel_option(settings)
    if option is not None and not settings.urls and device.type == "cpu":
        raise UserError(NO_EXPERT_PARALLEL_CPU.format(*option, "and this run is on a CPU"))


def check_is_deterministic(client: Client) -> None:
    """Check that a server which already ran samples repeatably.

    Raises:
        UserError: where it does not.
    """
    if not client.get("/server_info").get("enable_deterministic_inference"):
        raise UserError(
            f"rollout.sglang.deterministic=true, but the SGLang server {client.url} of rollout.sglang.urls "
            "was started without it; add it to the server's `opo serve`, or set it to false here"
        )


def check_cuts(client: Client, config: Config) -> None:
    """Check that a server which already ran is cut as the recipe says, before it is sent slices.

    Raises:
        UserError: where it is not.
    """
    info = client.get("/server_info")
    wanted = {"tp_size": config.rollout.sglang.tensor_parallel_size, "ep_size": expert_ranks(config)}
    for name, size in wanted.items():
        if info.get(name) != size:
            raise UserError(
                f"rollout.sglang.layout=slices needs a server with {name}={size}, but the SGLang server "
                f"{client.url} of rollout.sglang.urls has {name}={info.get(name)}; start it by `opo serve` "
                "with this recipe, or set rollout.sglang.layout=full"
            )
