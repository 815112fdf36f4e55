"""The experts that a server returns: asked for, unpacked, and refused where no router chose them."""

from __future__ import annotations

import base64
import json
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opo_megatron.config import Config
from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang import expert_recording
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.installation import SERVE
from opo_megatron.rollout.sglang.replies import generate_body
from opo_megatron.rollout.sglang.routed_experts import experts_of, unpack_experts
from opo_megatron.rollout.sglang.server import Server
from tests.support.fixtures import small_config
from tests.support.web_server import web_server

SGLANG, EXPERTS = "rollout.engine=sglang", "policy.model.num_moe_experts=4"
MOE = (SGLANG, EXPERTS, "policy.model.moe_ffn_hidden_size=24", "policy.model.num_layers=2")
OPTIONS = "rollout.sglang.options"
LAYERS, TOPK = 2, 2
REQUESTS = [GenerationRequest(11, 0, 0, (1, 2)), GenerationRequest(12, 1, 0, (3,))]
SAMPLING = Sampling(max_tokens=3, stop_tokens=(), seed=(1,), routed_experts=True)


def config_of(num_experts: int = 4) -> Config:
    return small_config(*MOE, f"policy.model.num_moe_experts={num_experts}")


def table_of(tokens: int, num_experts: int = 4) -> torch.Tensor:
    """Experts that a router may choose: all different in each token and layer."""
    first = torch.arange(tokens * LAYERS).view(tokens, LAYERS, 1) % num_experts
    return torch.cat([first, (first + num_experts - 1) % num_experts], 2).to(torch.int32)


def packed(table: torch.Tensor) -> str:
    return base64.b64encode(table.to(torch.int32).numpy().tobytes()).decode()


def reply(ids: Sequence[int], experts: Any, finish: str = "length") -> dict[str, Any]:
    log_probs = [[-0.5, token, None] for token in ids]
    meta_info = {"finish_reason": {"type": finish}, "output_token_logprobs": log_probs, "weight_version": "1"}
    if experts is not None:
        meta_info["routed_experts"] = experts
    return {"output_ids": list(ids), "meta_info": meta_info}


@pytest.mark.parametrize(
    ("num_experts", "dtype"),
    [(3, torch.uint8), (4, torch.uint8), (128, torch.uint8), (256, torch.uint8), (257, torch.int16)],
)
def test_experts_arrive_as_they_were_sent_in_the_smallest_type(num_experts: int, dtype: torch.dtype) -> None:
    model = config_of(num_experts).policy.model
    tables = [table_of(4, num_experts), table_of(1, num_experts)]  # prompt + response - 1
    replies = [reply([5, 6, 7], packed(tables[0])), reply([5], packed(tables[1]))]
    unpack_experts(REQUESTS, replies, model)
    found = experts_of(replies, model)
    assert found.dtype == dtype and torch.equal(found.long(), torch.cat(tables).long())


def test_a_rank_without_requests_has_the_column_too() -> None:
    found = experts_of([], config_of().policy.model)
    assert found.shape == (0, LAYERS, TOPK) and found.dtype == torch.uint8


def changed(change: Callable[[torch.Tensor], None]) -> str:
    table = table_of(4)
    change(table)
    return packed(table)


def set_to(layer: int, *experts: int) -> Callable[[torch.Tensor], None]:
    def change(table: torch.Tensor) -> None:
        table[2, layer, : len(experts)] = torch.tensor(experts, dtype=torch.int32)

    return change


@pytest.mark.parametrize(
    ("experts", "error", "words"),
    [
        (None, UserError, "returned no experts with a response to prompt 11; start it with --enable-return-"),
        (
            "",
            EngineFailure,
            "0 bytes of experts came with a response to prompt 11, but 2 experts of 4 tokens",
        ),
        (packed(table_of(4))[:-4], EngineFailure, "tokens in 2 layers have 64"),  # cut
        (packed(table_of(4))[:-3], EngineFailure, "are not base64"),  # cut inside a group
        ("é" + packed(table_of(4))[1:], EngineFailure, "are not base64"),
        (packed(table_of(4))[:-1] + "*", EngineFailure, "are not base64"),
        (7, EngineFailure, "are not base64"),
        (packed(table_of(3)), EngineFailure, "48 bytes of experts came"),  # a token less
        (packed(table_of(5)), EngineFailure, "80 bytes of experts came"),  # with the last token
        (packed(table_of(4)[:, :1]), EngineFailure, "32 bytes of experts came"),  # a layer less
        (packed(table_of(4)[:, :, :1]), EngineFailure, "32 bytes of experts came"),  # top 1
        (
            changed(set_to(1, 4)),
            UserError,
            "to expert 4 in layer 1, but policy.model.num_moe_experts=4; give",
        ),
        (changed(set_to(0, -1)), UserError, "to expert -1 in layer 0, but policy.model.num_moe_experts=4"),
        (changed(set_to(0, 260)), UserError, "to expert 260 in layer 0"),  # 4 in a byte
        (changed(set_to(0, 2**31 - 1)), UserError, "to expert 2147483647 in layer 0"),
        (changed(set_to(1, 3, 3)), UserError, "twice to expert 3 in layer 1, so it does not record"),
        (packed(torch.zeros(4, LAYERS, TOPK)), UserError, "twice to expert 0 in layer 0"),  # never recorded
    ],
)
def test_experts_that_no_router_chose_are_refused_with_a_sentence(
    experts: Any, error: type[Exception], words: str
) -> None:
    model = config_of().policy.model
    with pytest.raises(error) as raised:
        unpack_experts(REQUESTS[:1], [reply([5, 6, 7], experts)], model)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_every_pair_of_a_tokens_experts_is_compared() -> None:
    model = small_config(
        *MOE, "policy.model.num_moe_experts=9", "policy.model.moe_router_topk=4"
    ).policy.model
    good = torch.tensor([8, 1, 0, 5])
    for i in range(4):
        for j in range(i):
            table = good.repeat(4, LAYERS, 1)
            table[3, 1, i] = table[3, 1, j]
            with pytest.raises(UserError, match=f"twice to expert {good[j]} in layer 1"):
                unpack_experts(REQUESTS[:1], [reply([5, 6, 7], packed(table))], model)
    unpack_experts(REQUESTS[:1], [reply([5, 6, 7], packed(good.repeat(4, LAYERS, 1)))], model)


def test_an_aborted_reply_without_experts_is_left_to_the_check_of_its_end() -> None:
    unpack_experts(REQUESTS[:1], [reply([5], None, finish="abort")], config_of().policy.model)


@pytest.mark.parametrize("wants", [False, True])
def test_experts_are_asked_for_where_the_sampling_wants_them(wants: bool) -> None:
    sampling = Sampling(3, (), (1,), routed_experts=wants)
    assert generate_body(REQUESTS, sampling).get("return_routed_experts", False) is wants


@pytest.mark.parametrize(
    ("overrides", "records"),
    [
        (MOE, True),
        ((*MOE, "rollout.routing_replay=true"), True),
        ((*MOE, "rollout.routing_replay=false"), False),
        ((*MOE, "rollout.routing_replay=false", f"{OPTIONS}.enable_return_routed_experts=true"), True),
        ((*MOE, f"{OPTIONS}.enable_return_routed_experts=true"), True),
        ((SGLANG,), False),
    ],
)
def test_servers_record_experts_where_they_are_replayed(
    overrides: tuple[str, ...], records: bool, tmp_path: Path
) -> None:
    server = Server(small_config(*overrides), tmp_path, tmp_path / "log", "server", None)
    assert server.arguments(30000).count("--enable-return-routed-experts") == records


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((f"{OPTIONS}.enable_return_routed_experts=false",), "is false and rollout.routing_replay is true"),
        ((OPTIONS + "={enable-return-routed-experts: null}",), "is null and rollout.routing_replay is true"),
        (("policy.model.qk_layernorm=false",), "=sglang and policy.model.qk_layernorm=false"),
        (("policy.model.add_qkv_bias=true",), "but SGLang's model with experts is Qwen3-MoE's; set"),
        ((f"{OPTIONS}.ep_size=2", "policy.device=cpu"), "ep_size=2 with policy.device=cpu, where SGLang"),
        ((OPTIONS + "={ep-size: 2}", "policy.device=cpu"), "ep_size=2 with policy.device=cpu"),
        ((f"{OPTIONS}.ep=4", "policy.device=cpu"), "options.ep=4 with policy.device=cpu"),
        ((f"{OPTIONS}.expert_parallel_size=2", "policy.device=cpu"), "or set rollout.sglang.tensor_parallel"),
    ],
)  # fmt: skip
def test_what_servers_cannot_do_with_experts_is_refused_with_the_recipe(
    overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError) as raised:
        small_config(*MOE, *overrides)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_distributed_experts_without_gpus_are_refused_at_the_start(tmp_path: Path) -> None:
    config = small_config(*MOE, f"{OPTIONS}.ep_size=2", f"run.dir={tmp_path}")
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), rank=0)
    with pytest.raises(UserError, match="ep_size=2 and this run is on a CPU, where SGLang cannot distribute"):
        SglangEngine(config, parallel, tmp_path, print)
    small_config(*MOE, f"{OPTIONS}.ep_size=1", "policy.device=cpu")


@pytest.mark.parametrize("value", [True, False, None, 0, "absent"])
def test_servers_that_already_run_are_asked_whether_they_record_experts(value: Any) -> None:
    info = {} if value == "absent" else {"enable_return_routed_experts": value}
    with web_server(200, json.dumps(info)) as url:
        if value is True:
            expert_recording.check_server(Client(url, 5))
            return
        with pytest.raises(UserError) as raised:
            expert_recording.check_server(Client(url, 5))
    assert f"{url} of rollout.sglang.urls was started without --enable-return-routed-experts" in str(
        raised.value
    )


POOL = "sglang.srt.mem_cache.pool_host.common"
PACKAGES = [POOL.rsplit(".", levels)[0] for levels in (4, 3, 2, 1)]


def recorder(monkeypatch: pytest.MonkeyPatch, modules: Sequence[str], has_gpu: bool = False) -> Any:
    """`record_experts_on_cpu` of serve.py, in a process that has these modules."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # stubs nothing
    serve = runpy.run_path(str(SERVE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for name in [name for name in sys.modules if name.split(".")[0] == "sglang"]:
        monkeypatch.delitem(sys.modules, name)
    for name in modules:
        module = types.ModuleType(name)
        if name in PACKAGES:
            module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["serve.py", f"--{expert_recording.OPTION}"])
    return serve["record_experts_on_cpu"]


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ([], "(No module named 'sglang')"),
        (PACKAGES[:1], "(No module named 'sglang.srt')"),
        (PACKAGES[:3], "(No module named 'sglang.srt.mem_cache.pool_host')"),
        (PACKAGES, "(cannot import name 'common'"),
        ([*PACKAGES, POOL], "has no attribute 'ALLOC_MEMORY_FUNCS'"),
    ],
)
def test_an_sglang_that_keeps_experts_elsewhere_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, modules: Sequence[str], words: str
) -> None:
    with pytest.raises(SystemExit) as end:
        recorder(monkeypatch, modules)()
    assert words in str(end.value) and "set rollout.routing_replay=false" in str(end.value)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_experts_are_kept_in_plain_memory_only_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    record, allocators = recorder(monkeypatch, [*PACKAGES, POOL], has_gpu), {"cpu": None, "npu": None}
    monkeypatch.setattr(sys.modules[POOL], "ALLOC_MEMORY_FUNCS", allocators, raising=False)
    monkeypatch.setattr(sys.modules[PACKAGES[-1]], "common", sys.modules[POOL], raising=False)
    record()
    assert allocators["npu"] is None and (allocators["cpu"] is None) is has_gpu
    if not has_gpu:
        assert allocators["cpu"]((2, 3), torch.int32, device="cpu", pin_memory=True).shape == (2, 3)  # type: ignore[misc]
