"""Repeatable samples and the backend of broadcasts: options, seeds, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import Backend, BackendConfig

from opo_megatron.config import to_yaml
from opo_megatron.config.choices import GroupBackend
from opo_megatron.config.compare import check_resume
from opo_megatron.errors import UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.replies import generate_body, sampling_params
from opo_megatron.rollout.sglang.server import Server
from opo_megatron.rollout.sglang.server_checks import check_is_deterministic
from opo_megatron.rollout.sglang.transfer import _STORE_PREFIXES, group_backend
from opo_megatron.utils.hashing import hash_of
from tests.support.fixtures import small_config
from tests.support.web_server import web_server

FP8 = (
    "policy.fp8=blockwise",
    "policy.model.hidden_size=256",
    "policy.model.kv_channels=128",
    "policy.model.ffn_hidden_size=512",
    "policy.model.num_query_groups=2",
)
BROADCAST = ("rollout.sglang.transport=distributed",)
GLOO, NCCL = (f"rollout.sglang.distributed_backend={name}" for name in ("gloo", "nccl"))
REQUESTS = [GenerationRequest(11, 0, 0, (1, 2)), GenerationRequest(12, 1, 0, (3,))]
OPTIONS = "rollout.sglang.options"


@pytest.mark.parametrize("seed", [(1,), (1, 0, 7), (2, 0, 7), (1, 1, 7), (1, 0, 8)])
def test_every_response_has_the_seed_that_the_local_engine_would_take(seed: tuple[int, ...]) -> None:
    requests = [GenerationRequest(p, p, k, (1,)) for p in (3, 4) for k in range(4)]
    params = generate_body(requests, Sampling(3, (7,), seed))["sampling_params"]
    seeds = [one.pop("sampling_seed") for one in params]
    assert params == [sampling_params(Sampling(3, (7,), seed))] * len(requests)
    assert seeds == [hash_of((*seed, r.prompt_id, r.sample_index)) for r in requests]
    assert len(set(seeds)) == len(seeds) and all(-(2**63) <= one < 2**63 for one in seeds)
    # Neither the rank, nor the order, nor the others of a post matter.
    reversed_part = generate_body(requests[5:2:-1], Sampling(9, (), seed))["sampling_params"]
    assert [one["sampling_seed"] for one in reversed_part] == seeds[5:2:-1]


def test_seeds_differ_between_steps_streams_and_runs() -> None:
    seeds = {
        one["sampling_seed"]
        for seed in ((1, 0, 7), (2, 0, 7), (1, 1, 7), (1, 0, 8))
        for one in generate_body(REQUESTS, Sampling(3, (), seed))["sampling_params"]
    }
    assert len(seeds) == 4 * len(REQUESTS)


GPU_SERVER = ("rollout.engine=sglang", "policy.dtype=bf16")
DETERMINISTIC = (*GPU_SERVER, "rollout.sglang.deterministic=true")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (DETERMINISTIC, ["--enable-deterministic-inference", "--attention-backend triton"]),
        ((*DETERMINISTIC, f"{OPTIONS}.attention_backend=fa3"), ["--attention-backend fa3"]),
        ((*DETERMINISTIC, OPTIONS + "={attention-backend: flashinfer}"), ["--attention-backend flash"]),
        ((*DETERMINISTIC, "rollout.sglang.tensor_parallel_size=2"), ["--enable-deterministic", "--tensor-p"]),
        ((*DETERMINISTIC, *FP8), ["--enable-deterministic-inference"]),
    ],
)  # fmt: skip
def test_deterministic_servers_get_sglangs_own_options(
    overrides: tuple[str, ...], words: list[str], tmp_path: Path
) -> None:
    server = Server(small_config(*overrides), tmp_path, tmp_path / "log", "server", ["0"])
    line = " ".join(server.arguments(30000))
    assert all(word in line for word in words) and line.count("--attention-backend") == 1
    plain = Server(small_config(*GPU_SERVER), tmp_path, tmp_path / "log", "server", ["0"])
    options = [word for word in plain.arguments(30000) if word.startswith("--")]
    assert not any("deterministic" in word or "attention" in word for word in options)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((*DETERMINISTIC, "policy.device=cpu"), "with policy.device=cpu, where SGLang has no"),
        ((*DETERMINISTIC, f"{OPTIONS}.attention_backend=torch_native"), "which needs one of triton,"),
        ((*DETERMINISTIC, f"{OPTIONS}.attention_backend=flashmla"), "attention_backend=flashmla with"),
        ((*DETERMINISTIC, f"{OPTIONS}.decode_attention_backend=aiter"), "decode_attention_back"),
        ((*DETERMINISTIC, OPTIONS + "={prefill-attention-backend: x}"), "or rollout.sglang.det"),
        ((*DETERMINISTIC, f"{OPTIONS}.enable_deterministic_inference=false"), "remove the first"),
        ((*GPU_SERVER, "rollout.sglang.distributed_backend=gloo"), "=tensor, which broadcasts nothing"),
        ((*GPU_SERVER, *BROADCAST, "policy.device=cpu", NCCL), "policy.device=cpu, whose memory NCCL"),
        ((*GPU_SERVER, *BROADCAST, GLOO, *FP8), "but gloo does not send FP8; set"),
        ((*GPU_SERVER, *BROADCAST, "rollout.sglang.distributed_backend=mpi"), "'mpi'; it must be"),
    ],
)  # fmt: skip
def test_what_servers_cannot_do_is_refused_with_the_recipe(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError) as error:
        small_config(*overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("backend", [None, "gloo", "nccl"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_backend_of_broadcasts_follows_the_device_unless_it_is_set(
    backend: str | None, device: str
) -> None:
    chosen, torch_device = None if backend is None else GroupBackend(backend), torch.device(device)
    if (backend, device) == ("nccl", "cpu"):
        with pytest.raises(UserError, match="distributed_backend=nccl, but this run's weights are on a CPU"):
            group_backend(chosen, torch_device)
        return
    usual = "gloo" if device == "cpu" else "nccl"
    assert group_backend(chosen, torch_device).value == (backend or usual)


def test_store_prefixes_are_those_of_torchs_own_groups() -> None:
    """A group's backend is made under the first device that its library serves, wherever the tensors are."""
    for backend in GroupBackend:
        devices = BackendConfig(Backend(backend.value)).get_device_backend_map()
        assert _STORE_PREFIXES[backend] == f"{next(iter(devices))}/"


def test_deterministic_without_gpus_is_refused_when_the_engine_starts(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = small_config(*DETERMINISTIC, f"run.dir={tmp_path}")
    parallel: Any = SimpleNamespace(device=torch.device("cpu"), rank=0)
    with pytest.raises(UserError, match="and this run is on a CPU, where SGLang has no"):
        SglangEngine(config, parallel, tmp_path, print)


@pytest.mark.parametrize(
    ("reply_text", "is_deterministic"),
    [
        ('{"enable_deterministic_inference": true}', True),
        ('{"enable_deterministic_inference": false}', False),
        ('{"enable_deterministic_inference": null}', False),
        ('{"version": "0.4.0"}', False),
        ("{}", False),
    ],
)
def test_servers_that_already_run_are_asked_whether_they_are_deterministic(
    reply_text: str, is_deterministic: bool
) -> None:
    with web_server(200, reply_text) as url:
        if is_deterministic:
            check_is_deterministic(Client(url, 5))
            return
        with pytest.raises(UserError, match="was started without it; add it to the server's `opo serve`"):
            check_is_deterministic(Client(url, 5))


def test_a_resumed_run_stays_as_repeatable_as_it_was(tmp_path: Path) -> None:
    """Other keys of the servers may change."""
    recipe = tmp_path / "config.yaml"
    for before, now in ((DETERMINISTIC, GPU_SERVER), (GPU_SERVER, DETERMINISTIC)):
        recipe.write_text(to_yaml(small_config(*before)))
        with pytest.raises(UserError, match=r"sglang\.deterministic is .* --allow rollout\.sg"):
            check_resume(small_config(*now), recipe, 3, [])
        check_resume(small_config(*now), recipe, 3, ["rollout.sglang.deterministic"])
        check_resume(small_config(*before, "rollout.sglang.transport=disk"), recipe, 3, [])
