"""A real server: violations of on-policyness are detected in the step in which they happen, and only the run
itself may ask it anything."""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import torch

from opo_megatron.algorithm.on_policy import check_versions
from opo_megatron.build import open_run
from opo_megatron.errors import EngineFailure, OnPolicyError, Preempted
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.probe import PROBE_SAMPLING
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.transfer import Sender
from opo_megatron.run import Run
from opo_megatron.weights.engine_slices import EngineTensor
from opo_megatron.weights.slice_stream import SliceStream
from tests.support.fixtures import small_config
from tests.support.servers import processes_of, sglang_python


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run with a server of its own; its policy is a Llama without QK-norm."""
    run_dir = tmp_path_factory.mktemp("contract") / "run"
    config = small_config(
        f"run.dir={run_dir}",
        "policy.model.qk_layernorm=false",
        "policy.model.max_sequence_length=1024",
        "policy.model.ffn_hidden_size=64",  # a multiple of 32, so that a CPU server can be sent slices
        "rollout.engine=sglang",
        f"rollout.sglang.python={sglang_python()}",
        "rollout.sglang.max_running_requests=32",
        "rollout.sglang.timeout_seconds=60",
        "rollout.sglang.share_memory=true",  # the order of calls is the same on a CPU, which saves no memory
        "rollout.prompts_per_step=4",
        "rollout.sglang.restarts=1",
        "rollout.sglang.options={log_level: info, enable_metrics: true}",  # logs all arguments of the server
        "warm_start.steps=0",
        "observe.kl=off",
        "observe.tensorboard=false",
    )
    with open_run(config) as run:
        yield run
    assert processes_of(run_dir) == []


@pytest.fixture(autouse=True)
def synchronized(run: Run) -> None:
    """Each test starts with an engine that holds the policy's weights."""
    run.generation.synchronize()
    assert run.generation.sync_difference < 1e-4


def engine_of(run: Run) -> SglangEngine:
    assert isinstance(run.generation.engine, SglangEngine)
    return run.generation.engine


def change_policy(run: Run, name: str = "decoder.layers.1.mlp.linear_fc1.weight") -> None:
    """Like an optimizer step: new weights, the next version."""
    weight = run.policy.chunks[0].get_parameter(name)
    generator = torch.Generator().manual_seed(run.policy.version)
    with torch.no_grad():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    run.policy.version += 1


def requests(count: int, length: int = 8) -> list[GenerationRequest]:
    return [GenerationRequest(i, i, 0, tuple((i + 3 * j) % 17 for j in range(length))) for i in range(count)]


def test_a_missing_sync_is_detected_by_the_version(run: Run) -> None:
    change_policy(run)
    rollouts = run.generation.generate(requests(4), Sampling(6, (), (1,)), "test")
    with pytest.raises(OnPolicyError, match=rf"version {run.policy.version} but 24 of 24 sampled tokens"):
        check_versions(rollouts.weight_versions, run.policy.version)


def test_weights_that_did_not_arrive_are_detected_by_the_probe(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_policy(run)
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "send", lambda self, bucket: None)
        with pytest.raises(OnPolicyError, match=r"after the sync of version \d+, the SGLang server http"):
            run.generation.synchronize()


def test_an_altered_layer_is_detected_by_the_probe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    write = SliceStream._write

    def altered(
        self: SliceStream, tensor: EngineTensor, rank: int, pieces: object, values: torch.Tensor
    ) -> None:
        write(self, tensor, rank, pieces, values)  # type: ignore[arg-type]
        if tensor.name == "model.layers.2.self_attn.qkv_proj.weight":
            values.mul_(1.01)

    with monkeypatch.context() as patch:
        patch.setattr(SliceStream, "_write", altered)
        with pytest.raises(OnPolicyError, match="differs from the policy by"):
            run.generation.synchronize()


def test_a_cache_that_was_not_flushed_is_detected_by_the_probe(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = Client.post

    def without_flush(self: Client, path: str, *args: object, **body: object) -> object:
        return None if path.startswith("/flush_cache") else post(self, path, *args, **body)  # type: ignore[arg-type]

    change_policy(run, "decoder.layers.0.self_attention.linear_qkv.weight")
    with monkeypatch.context() as patch:
        patch.setattr(Client, "post", without_flush)
        with pytest.raises(OnPolicyError, match="answers from an old cache"):
            run.generation.synchronize()


def test_a_response_sampled_by_two_versions_is_detected(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, post = engine_of(run), Client.post

    def in_place(self: Client, path: str, *args: object, **body: object) -> object:
        if path.startswith("/flush_cache"):
            return None
        if path == "/pause_generation":
            body["mode"] = "in_place"  # running requests continue with the new weights
        return post(self, path, *args, **body)  # type: ignore[arg-type]

    before, results = run.policy.version, []
    sampling = Sampling(900, (), (1,))
    thread = threading.Thread(target=lambda: results.append(engine.generate(requests(1), sampling)))
    thread.start()
    time.sleep(1.0)
    change_policy(run)
    with monkeypatch.context() as patch:
        patch.setattr(Client, "post", in_place)
        engine.update_weights(run.policy.stream_weights(), run.policy.version)
    thread.join()
    assert results[0].weight_versions.unique().tolist() == [before, before + 1]
    with pytest.raises(OnPolicyError, match=rf"\(\d+ of version {before}\)"):
        check_versions(results[0].weight_versions, run.policy.version)


def test_weights_read_back_from_the_server_equal_the_policys(run: Run) -> None:
    change_policy(run)
    run.generation.synchronize()
    client = engine_of(run)._clients[0]
    streamed = {name: tensor.clone() for bucket in run.policy.stream_weights() for name, tensor in bucket}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        name = f"model.layers.1.{name}.weight"
        values = torch.tensor(client.post("/get_weights_by_name", name=name, truncate_size=8))
        torch.testing.assert_close(values, streamed[name][: len(values)], rtol=0, atol=0)


def test_slices_and_full_tensors_give_the_same_log_probabilities(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(run)
    by_slices = run.generation.engine.probe(requests(4), PROBE_SAMPLING)
    with monkeypatch.context() as patch:
        assert engine._slices is not None
        patch.setattr(engine, "_slices", None)
        patch.setattr(engine, "_transfers", {})
        run.generation.synchronize()
        by_full = run.generation.engine.probe(requests(4), PROBE_SAMPLING)
    for name, rollouts in by_slices.items():
        expected = by_full[name].engine_log_prob
        assert rollouts.engine_log_prob is not None and expected is not None
        assert torch.equal(rollouts.engine_log_prob, expected)


@pytest.mark.slow
def test_a_dead_server_is_restarted_and_the_whole_step_regenerated(run: Run) -> None:
    server = engine_of(run)._server
    assert server is not None and server.pid is not None
    first = server.pid
    os.kill(first, signal.SIGKILL)
    rollouts = run.generation.generate(requests(6), Sampling(5, (), (1,)), "test")
    assert len(rollouts) == 6 and run.generation.failures == 1 and server.pid != first
    assert rollouts.weight_versions is not None
    assert rollouts.weight_versions.unique().tolist() == [run.policy.version]


def test_a_stop_request_aborts_the_generation_of_the_servers(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_reasons: list[str] = []
    post = Client.post

    def recording(self: Client, path: str, **body: object) -> object:
        replies = post(self, path, **body)
        if path == "/generate":
            finish_reasons.extend(one["meta_info"]["finish_reason"]["type"] for one in replies)
        return replies

    monkeypatch.setattr(Client, "post", recording)
    monkeypatch.setattr(run.saver.stop, "_signal", signal.SIGUSR1)
    with pytest.raises(Preempted, match="SIGUSR1"):
        run.generation.generate(requests(32), Sampling(1000, (), (1,)), "test", interruptible=True)
    assert len(finish_reasons) == 32 and "abort" in finish_reasons
    monkeypatch.setattr(run.saver.stop, "_signal", 0)
    assert len(run.generation.generate(requests(2), Sampling(5, (), (1,)), "test")) == 2


def test_policy_and_engine_share_memory_in_turns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    post, memory = Client.post, run.policy.memory

    def recorded(self: Client, path: str, *args: object, **body: object) -> object:
        tags = " ".join(body.get("tags", []))  # type: ignore[arg-type]
        is_memory_call = path.endswith("_memory_occupation")
        events.append(f"{path[1:].split('_')[0]} {tags}" if is_memory_call else path.split("?")[0])
        return post(self, path, *args, **body)  # type: ignore[arg-type]

    for name in ("free_gradients", "offload_optimizer", "reload"):
        method = getattr(memory, name)
        monkeypatch.setattr(memory, name, lambda name=name, method=method: (events.append(name), method()))
    monkeypatch.setattr(Client, "post", recorded)
    run.generation.memory.before_training()
    assert memory.is_complete and events == ["release kv_cache weights", "reload"]
    events.clear()
    run.generation.synchronize()
    calls = [event for event in events if "pause" not in event and "flush" not in event]
    assert calls == [
        "free_gradients",
        "resume weights",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/end_weight_update",
        "/update_weight_version",
        "/continue_generation",
        "offload_optimizer",
        "resume kv_cache",
        "/generate",
    ]
    events.clear()
    with run.generation.memory.saving():
        assert memory.is_complete
    assert not memory.is_complete
    assert events == ["release kv_cache", "reload", "free_gradients", "offload_optimizer", "resume kv_cache"]
    assert len(run.generation.generate(requests(4), Sampling(6, (), (1,)), "test")) == 4


@pytest.mark.slow
def test_a_server_that_does_not_release_its_memory_is_stopped(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    post, server = Client.post, engine_of(run)._server

    def refusing(self: Client, path: str, *args: object, **body: object) -> object:
        if path == "/release_memory_occupation":
            raise EngineFailure("not idle")
        return post(self, path, *args, **body)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Client, "post", refusing)
        run.generation.memory.before_training()
    assert server is not None and not server.is_alive() and run.policy.memory.is_complete
    run.generation.synchronize()
    assert server.is_alive() and run.generation.sync_difference < 1e-4


def without_key(run: Run, method: str, path: str, **headers: str) -> int:
    """Status of a request with these headers and no others."""
    address = urlsplit(engine_of(run)._clients[0].url).netloc
    connection = http.client.HTTPConnection(address, timeout=20)
    try:
        connection.request(method, path, "{}" if method in ("POST", "PUT") else None, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def key_of(run: Run) -> str:
    server = engine_of(run)._server
    assert server is not None
    return server.key


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer", "Basic {}", "Bearer {}x", "{}"])
def test_no_endpoint_answers_without_the_key(run: Run, key: str | None) -> None:
    """Every path that the server lists, and those that it does not list, by every method."""
    listed = engine_of(run)._clients[0].get("/openapi.json")["paths"]
    endpoints = {(method.upper(), path) for path, methods in listed.items() for method in methods}
    assert len(endpoints) > 90 and ("POST", "/update_weights_from_tensor") in endpoints
    endpoints |= {("GET", path) for path in ("/", "/docs", "/redoc", "/openapi.json", "/nowhere", "//health")}
    endpoints |= {
        ("GET", path) for path in ("/health/x", "/healthy", "/health%2f..%2fgenerate", "/metrics/../generate")
    }
    endpoints |= {(method, "/generate") for method in ("OPTIONS", "HEAD", "PUT", "DELETE", "PATCH", "TRACE")}
    endpoints |= {(method, "/health") for method in ("POST", "OPTIONS")}
    headers = {} if key is None else {"Authorization": key.format(key_of(run))}
    statuses = {endpoint: without_key(run, *endpoint, **headers) for endpoint in sorted(endpoints)}
    answered = {endpoint: status for endpoint, status in statuses.items() if status != 401}
    assert set(answered) == {("GET", path) for path in ("/health", "/ready")}
    assert run.generation.engine.version == run.policy.version


def test_health_and_metrics_need_no_key_and_other_protocols_do(run: Run) -> None:
    assert {without_key(run, "GET", path) for path in ("/health", "/ready", "/metrics")} == {200}
    websocket = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    websocket["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    assert without_key(run, "GET", "/v1/realtime", **websocket) in (401, 403)
    assert without_key(run, "POST", "/generate", Host="127.0.0.1/health?") in (400, 401)
    both = {"Authorization": f"Bearer {key_of(run)}", "authorization": "Bearer wrong"}
    assert without_key(run, "GET", "/model_info", **both) == 401


def test_the_key_is_in_no_process_list_log_or_file(run: Run) -> None:
    key, server = key_of(run), engine_of(run)._server
    assert server is not None and server.pid is not None
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(processes) >= 3
    for process in [*processes, psutil.Process()]:
        assert key not in " ".join(process.cmdline()) and key not in str(process.environ()), process
    assert "'api_key': '(hidden)'" in server.log.read_text()
    run.generation.generate(requests(2), Sampling(3, (), (1,)), "test")
    files = [path for path in Path(run.config.run.dir).rglob("*") if path.is_file()]
    assert {"config.yaml", "server_0.log"} <= {path.name for path in files}
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_an_engine_without_complete_weights_does_not_generate(run: Run) -> None:
    engine = engine_of(run)
    engine.version = None
    with pytest.raises(EngineFailure, match="no complete weights"):
        engine.generate(requests(1), Sampling(5, (), (1,)))


def test_the_folder_of_the_model_holds_no_weights(run: Run) -> None:
    folder = Path(run.config.run.dir) / "sglang" / "model"
    assert [path.name for path in folder.iterdir()] == ["config.json"]
