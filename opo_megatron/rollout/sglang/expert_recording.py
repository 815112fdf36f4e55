"""The option by which a server records the experts that it takes; replies have them (`routed_experts.py`).

Torch is not imported: `opo serve` starts a server without it.
"""

from __future__ import annotations

from opo_megatron.config.schema import Config
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.client import Client

OPTION = "enable-return-routed-experts"
"""The option of a server that records experts."""


def options(config: Config) -> dict[str, object]:
    """Options of a server whose rollouts need its experts."""
    return {OPTION: True} if config.rollout.routing_replay else {}


def check_server(client: Client) -> None:
    """Check that a server which already ran records the experts that it takes.

    Raises:
        UserError: where it does not.
    """
    if not client.get("/server_info").get(OPTION.replace("-", "_")):
        raise UserError(
            f"rollout.routing_replay=true, but the SGLang server {client.url} of rollout.sglang.urls was "
            f"started without --{OPTION}; start it by `opo serve` with this recipe, or set "
            "rollout.routing_replay=false here"
        )
