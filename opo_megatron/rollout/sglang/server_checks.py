"""What servers must be able to do, checked before they are used; which of the external ones answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from opo_megatron.config.choices import Transport
from opo_megatron.config.rollout import SglangConfig
from opo_megatron.config.rules.sglang import (
    NO_DETERMINISTIC_CPU,
    NO_EXPERT_PARALLEL_CPU,
    expert_parallel_option,
)
from opo_megatron.config.rules.weight_layout import expert_ranks
from opo_megatron.config.schema import Config
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang import exact_mode, expert_recording
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


def answering(
    clients: Sequence[Client], parallel: Parallel, is_start: bool, log: Callable[[str], None]
) -> list[Client]:
    """The external servers that answer, as rank 0 finds them; a collective.

    Args:
        is_start: of the run, which begins with all of them.

    Raises:
        UserError: where one of them does not answer at the start, or none later.
    """
    found = [client.is_healthy() for client in clients] if parallel.rank == 0 else []
    healthy = all_gather_objects(parallel, found)[0]
    silent = [client.url for client, is_healthy in zip(clients, healthy, strict=True) if not is_healthy]
    if silent and (is_start or len(silent) == len(clients)):
        others = (
            "; start it, or remove it there" if is_start else ", nor does any other; start one, then resume"
        )
        raise UserError(f"the SGLang server {silent[0]} of rollout.sglang.urls does not answer{others}")
    if silent:
        log(f"{', '.join(silent)} of rollout.sglang.urls does not answer; the run continues with the others")
    return [client for client, is_healthy in zip(clients, healthy, strict=True) if is_healthy]


def check_external(client: Client, config: Config, gets_slices: bool) -> None:
    """Check that a server which already ran was started for such a recipe.

    Args:
        gets_slices: whether it is sent slices.

    Raises:
        UserError: where it was not.
    """
    if config.rollout.sglang.deterministic:
        check_is_deterministic(client)
    if gets_slices:
        check_cuts(client, config)
    if config.rollout.sglang.exact:
        exact_mode.check_server(config, client)
    if config.rollout.routing_replay:
        expert_recording.check_server(client)


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
