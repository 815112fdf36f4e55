"""What is asked of a server that ran before the run did."""

from __future__ import annotations

from typing import Any

import pytest

from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.server_checks import check_external
from tests.support.fixtures import small_config

URL = "http://node-0:30000"
SLICES = (f"rollout.sglang.urls=[{URL}]", "rollout.engine=sglang", "rollout.sglang.layout=slices")
EXPERTS = (
    "policy.model.num_moe_experts=4",
    "policy.model.moe_ffn_hidden_size=32",
    "rollout.routing_replay=false",
)
EP2 = "rollout.sglang.options.expert_parallel_size=2"


def reports(info: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Client:
    """A server with this reply to /server_info."""
    monkeypatch.setattr(Client, "get", lambda self, path: info if path == "/server_info" else None)
    return Client(URL, 1.0)


@pytest.mark.parametrize(
    ("overrides", "info", "wanted"),
    [
        (["rollout.sglang.tensor_parallel_size=2"], {"tp_size": 1, "ep_size": 1}, "tp_size=2"),
        (["rollout.sglang.tensor_parallel_size=2"], {"tp_size": 4, "ep_size": 1}, "tp_size=2"),
        ([], {"tp_size": 2, "ep_size": 1}, "tp_size=1"),
        ([], {"ep_size": 1}, "tp_size=1"),
        ([*EXPERTS, "rollout.sglang.tensor_parallel_size=2"], {"tp_size": 2, "ep_size": 2}, "ep_size=1"),
        ([*EXPERTS, "rollout.sglang.tensor_parallel_size=2", EP2], {"tp_size": 2, "ep_size": 1}, "ep_size=2"),
    ],
)
def test_a_server_that_is_cut_otherwise_is_refused_before_it_gets_slices(
    overrides: list[str], info: dict[str, Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, config = reports(info, monkeypatch), small_config(*SLICES, *overrides)
    name = wanted.partition("=")[0]
    message = (
        rf"layout=slices needs a server with {wanted}, but the SGLang server {URL} of rollout.sglang.urls "
        rf"has {name}={info.get(name)}; start it by `opo serve` with this recipe, or set .*layout=full"
    )
    with pytest.raises(UserError, match=message):
        check_external(client, config, gets_slices=True)
    check_external(client, config, gets_slices=False)
