"""Exact mode on GPUs, the trainer's side: how servers are started, asked and tested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import Parallel, initialize, shutdown
from opo_megatron.errors import OnPolicyError
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import WITHOUT_GRAPHS, GenerationRequest, Sampling
from opo_megatron.rollout.exact_check import check_exact
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.exact_batchings import ALONE, BATCHINGS, CHUNKED
from opo_megatron.rollout.sglang.exact_mode import options
from opo_megatron.rollout.sglang.replies import NO_GRAPH, TRACE, generate_body
from opo_megatron.rollout.sglang.server import Server
from opo_megatron.weights.random_init import random_weights
from tests.support.fixtures import VOCAB_SIZE, small_config

SGLANG = ("rollout.engine=sglang", "rollout.sglang.exact=true")


# ---------------------------------------------------------------------- the server's options


def words_of(tmp_path: Path, gpus: list[str] | None, *overrides: str) -> str:
    dtype = () if gpus is None else ("policy.device=cuda", "policy.dtype=bf16")
    config = small_config(f"run.dir={tmp_path}", *SGLANG, *dtype, *overrides)
    return " ".join(Server(config, tmp_path, tmp_path / "log", "server", gpus).arguments(30000))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("", "--attention-backend triton"),
        ("", "--sampling-backend pytorch"),
        ("", "--cuda-graph-backend-prefill disabled"),
        ("", "--kv-cache-dtype auto"),
        ("", "--enable-custom-logit-processor"),
        ("", "--chunked-prefill-size 4096"),
        ("rollout.sglang.options.chunked_prefill_size=512", "--chunked-prefill-size 512"),
        ("rollout.sglang.options.cuda_graph_bs_decode=[1,8]", "--cuda-graph-bs-decode 1 8"),
        ("rollout.sglang.options.disable_cuda_graph=true", "--disable-cuda-graph"),
    ],
)
def test_a_server_on_a_gpu_has_the_options_of_exact_mode(override: str, words: str, tmp_path: Path) -> None:
    line = words_of(tmp_path, ["0"], *([override] if override else []))
    assert words in line
    assert "--disable-overlap-schedule" not in line and "torch-compile" not in line
    assert "speculative" not in line and "deterministic" not in line


def test_a_server_on_a_cpu_keeps_its_options(tmp_path: Path) -> None:
    line = words_of(tmp_path, None)
    assert "--attention-backend torch_native" in line and "--chunked-prefill-size 1024" in line
    assert "cuda-graph" not in line and "kv-cache-dtype" not in line
    assert not set(options(small_config(*SGLANG), on_gpu=False)) & {"attention-backend", "sampling-backend"}


# ---------------------------------------------------------------------- the test at the start


@pytest.mark.parametrize(
    ("device", "setting", "absent"),
    [
        ("cuda", "rollout.temperature=1", set()),
        ("cpu", "rollout.temperature=1", {WITHOUT_GRAPHS}),
        ("cuda", "rollout.sglang.options.chunked_prefill_size=-1", {CHUNKED}),
        ("cpu", "rollout.sglang.options.chunked_prefill_size=-1", {CHUNKED, WITHOUT_GRAPHS}),
        ("cuda", "rollout.sglang.options.disable_cuda_graph=true", set()),
    ],
)
def test_a_server_on_a_gpu_is_also_tested_without_graphs(device: str, setting: str, absent: set[str]) -> None:
    engine: Any = SglangEngine.__new__(SglangEngine)
    engine.settings = small_config(*SGLANG, setting).rollout.sglang
    engine.parallel = SimpleNamespace(device=torch.device(device))
    assert list(engine.batchings()) == [one for one in BATCHINGS if one not in absent]
    few, many = (engine.check_size(one)[0] for one in (ALONE, WITHOUT_GRAPHS))
    assert few == 3 and (many > 100 or CHUNKED in absent)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "wanted", [{}, {"trace": True}, {"no_graph": True}, {"trace": True, "no_graph": True}], ids=str
)
def test_a_request_carries_what_it_wants_of_a_server_in_exact_mode(
    wanted: dict[str, bool], exact: bool
) -> None:
    requests = [GenerationRequest(i, i, 0, (1, 2)) for i in range(3)]
    body = generate_body(requests, Sampling(4, (0,), (1,)), exact, **wanted)
    for params in body["sampling_params"]:
        carried = params.get("custom_params", {})
        assert (TRACE in carried) is (exact and "trace" in wanted)
        assert (NO_GRAPH in carried) is (exact and "no_graph" in wanted)


GRAPHS = "with 3 slots"


class GraphEngine(LocalEngine):
    """A local engine, some of whose batchings record other log-probabilities."""

    faulty: tuple[str, ...] = ()

    def batchings(self) -> Sequence[str]:
        return [GRAPHS, WITHOUT_GRAPHS]

    def check_size(self, batching: str) -> tuple[int, int]:
        return super().check_size(GRAPHS)

    def generate_batched(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, batching: str
    ) -> Rollouts:
        rollouts = super().generate_batched(requests, sampling, GRAPHS)
        assert rollouts is not None and rollouts.engine_log_prob is not None
        if batching not in self.faulty:
            return rollouts
        lower = torch.nextafter(rollouts.engine_log_prob, torch.tensor(-torch.inf))
        return replace(rollouts, engine_log_prob=lower)


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    yield initialize(small_config())
    shutdown()


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ((), None),
        ((GRAPHS,), rf"{GRAPHS} .* first in the CUDA graphs of decoding, without which they are equal, so"),
        ((WITHOUT_GRAPHS,), rf"{WITHOUT_GRAPHS} .* first in an operation whose rows depend on the others"),
        ((GRAPHS, WITHOUT_GRAPHS), rf"{GRAPHS} .* first in an operation whose rows depend on the others"),
    ],
)
def test_the_check_names_graphs_where_only_they_differ(
    parallel: Parallel, faulty: tuple[str, ...], message: str | None
) -> None:
    config = small_config("rollout.local.exact=true")
    model = config.policy.model
    weights = random_weights(model, VOCAB_SIZE, config.run.seed)
    policy = Policy(config, VOCAB_SIZE, parallel, config.optimizer, weights)
    engine = GraphEngine(model, VOCAB_SIZE, torch.float32, torch.device("cpu"), 24, exact=True)
    engine.faulty = faulty
    if message is None:
        assert check_exact(config, policy, engine, parallel) > 0
    else:
        with pytest.raises(OnPolicyError, match=message):
            check_exact(config, policy, engine, parallel)
