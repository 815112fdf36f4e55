"""SGLang's replies as rollouts; which ranks share a server; what HTTP failures become."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from opo_megatron.batch.rollouts import FINISH_LENGTH, FINISH_STOP
from opo_megatron.cli.main import main
from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.placement import server_group
from opo_megatron.rollout.sglang.replies import UNKNOWN_VERSION, generate_body, rollouts_of, sampling_params
from opo_megatron.rollout.sglang.server import Server
from opo_megatron.rollout.sglang.transfer import _handle, check_allocator, pickled
from tests.support.fixtures import small_config
from tests.support.paths import RECIPES
from tests.support.web_server import web_server

STOP = 7
SAMPLING = Sampling(max_tokens=3, stop_tokens=(STOP,), seed=(1,), temperature=0.7)
REQUESTS = [GenerationRequest(11, 0, 0, (1, 2)), GenerationRequest(12, 1, 0, (3,))]


def reply(ids: list[int], finish: dict[str, Any], **meta_info: Any) -> dict[str, Any]:
    log_probs = [[-0.5 - i, token, None] for i, token in enumerate(ids)]
    defaults = {"finish_reason": finish, "output_token_logprobs": log_probs, "weight_version": "4"}
    return {"output_ids": ids, "meta_info": defaults | meta_info}


def test_replies_become_rollouts_token_by_token() -> None:
    replies = [
        reply([5, STOP], {"type": "stop", "matched": STOP}),
        reply([5, 6, 5], {"type": "length", "length": 3}),
    ]
    rollouts = rollouts_of(REQUESTS, replies, SAMPLING)
    assert rollouts.responses() == [[5, STOP], [5, 6, 5]]
    assert rollouts.finish_reasons.tolist() == [FINISH_STOP, FINISH_LENGTH]
    assert rollouts.prompt_ids.tolist() == [11, 12] and rollouts.prompt_tokens.tolist() == [1, 2, 3]
    assert rollouts.engine_log_prob is not None and rollouts.weight_versions is not None
    assert rollouts.engine_log_prob.tolist() == [-0.5, -1.5, -0.5, -1.5, -2.5]
    assert rollouts.weight_versions.tolist() == [4] * 5


def test_a_response_sampled_by_two_versions_has_both() -> None:
    spans = [{"version": "4", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 3}]
    one = reply([5, 6, 5], {"type": "length"}, weight_versions=spans)
    versions = rollouts_of(REQUESTS[:1], [one], SAMPLING).weight_versions
    assert versions is not None and versions.tolist() == [4, 4, 5]


@pytest.mark.parametrize("version", ["default", None, "-3", "4.0"])
def test_a_version_that_is_not_a_number_is_unknown(version: str | None) -> None:
    one = reply([5], {"type": "length"}, weight_version=version)
    versions = rollouts_of(REQUESTS[:1], [one], SAMPLING).weight_versions
    assert versions is not None and versions.tolist() == [UNKNOWN_VERSION]


@pytest.mark.parametrize("finish", [{"type": "stop", "matched": 6}, {"type": "stop", "matched": "words"}])
def test_a_stop_token_unknown_to_the_task_is_rejected(finish: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"none of the task's stop tokens \[7\]"):
        rollouts_of(REQUESTS[:1], [reply([5, 6], finish)], SAMPLING)


def test_an_aborted_reply_or_one_without_log_probs_is_a_failure() -> None:
    with pytest.raises(EngineFailure, match="ended by abort: gone"):
        rollouts_of(REQUESTS[:1], [reply([5], {"type": "abort", "message": "gone"})], SAMPLING)
    with pytest.raises(EngineFailure, match="0 log-probabilities came with the 1 tokens"):
        rollouts_of(REQUESTS[:1], [reply([5], {"type": "length"}, output_token_logprobs=[])], SAMPLING)


def test_sampling_params_have_no_truncation_and_stop_by_token_id() -> None:
    assert sampling_params(SAMPLING) == {
        "max_new_tokens": 3,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": -1,
        "stop_token_ids": [STOP],
    }
    assert sampling_params(Sampling(3, (), (1,), greedy=True))["temperature"] == 0.0
    assert sampling_params(Sampling(3, (), (1,)))["ignore_eos"] is True


@pytest.mark.parametrize(
    ("hosts", "servers", "groups"),
    [
        ("aaaa", 1, [[0, 1, 2, 3]] * 4),
        ("aaaa", 2, [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ("abab", 1, [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ("aabb", 2, [[0], [1], [2], [3]]),
    ],
)
def test_ranks_of_a_node_share_its_servers_in_equal_parts(
    hosts: str, servers: int, groups: list[list[int]]
) -> None:
    assert [server_group(hosts, rank, servers) for rank in range(len(hosts))] == groups


def test_servers_that_do_not_divide_the_ranks_are_rejected() -> None:
    with pytest.raises(UserError, match=r"rollout\.sglang\.servers=2 does not divide the 3 ranks"):
        server_group("aaa", 0, 2)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("prefix", [(), (5,), (6, 5)])
def test_a_continued_request_has_the_random_numbers_of_the_whole_one(
    prefix: tuple[int, ...], exact: bool
) -> None:
    """Servers count positions from the start of their input: the prompt and what is sampled already."""
    whole = generate_body(REQUESTS, SAMPLING, exact)
    body = generate_body(REQUESTS, SAMPLING, exact, prefixes=[prefix, ()])
    assert body["input_ids"] == [[1, 2, *prefix], [3]]
    assert [one.pop("max_new_tokens") for one in body["sampling_params"]] == [3 - len(prefix), 3]
    assert [one.pop("max_new_tokens") for one in whole["sampling_params"]] == [3, 3]
    assert body["sampling_params"] == whole["sampling_params"]
    assert "sampling_seed" in whole["sampling_params"][0] or exact


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, UserError, "asks for a key"),
        (403, UserError, "asks for a key"),
        (400, UserError, "refuses the request"),
        (500, EngineFailure, r"/x failed \(500\): no"),
        (503, EngineFailure, r"/x failed \(503\)"),
    ],
)
def test_a_stream_that_does_not_open_is_a_mistake_or_a_failure(
    status: int, error: type[Exception], words: str
) -> None:
    with web_server(status, "no") as url, pytest.raises(error, match=words):
        Client(url, 5.0).stream("/x")


def test_a_stream_is_read_to_its_end_and_is_none_for_a_missing_path() -> None:
    with web_server(404, "no") as url:
        assert Client(url, 5.0).stream("/x") is None
    with web_server(200, "some bytes") as url:
        stream = Client(url, 5.0).stream("/x")
        assert stream is not None
        with contextlib.closing(stream):
            assert b"".join(iter(stream.read, b"")) == b"some bytes"
    with pytest.raises(EngineFailure, match="/x closed the connection"):
        Client(url, 5.0).stream("/x")
    with web_server(200, "late", delay=2.0) as url, pytest.raises(EngineFailure, match=r"for 0\.3 seconds"):
        Client(url, 0.3).stream("/x")


def test_http_replies_are_parsed_or_raise() -> None:
    with web_server(200, json.dumps({"a": 1})) as url:
        assert Client(url, 5.0).post("/x") == {"a": 1} and Client(url, 5.0).is_healthy()
    with web_server(200, "done") as url:
        assert Client(url, 5.0).post("/x") == "done"
    bad_request = pytest.raises(UserError, match=r"/x refuses the request \(400\): too long")
    with web_server(400, json.dumps({"error": {"message": "too long"}})) as url, bad_request:
        Client(url, 5.0).post("/x")
    with web_server(401, "no") as url, pytest.raises(UserError, match=r"set rollout\.sglang\.api_key"):
        Client(url, 5.0).post("/x")
    with web_server(500, "boom") as url:
        assert not Client(url, 5.0).is_healthy()
        with pytest.raises(EngineFailure, match=r"/x failed \(500\): boom"):
            Client(url, 5.0).post("/x")


def test_timeouts_and_refused_connections_are_failures() -> None:
    with (
        web_server(200, "{}", delay=1.0) as url,
        pytest.raises(EngineFailure, match=r"did not reply for 0\.1 seconds"),
    ):
        Client(url, 0.1).post("/x")
    with pytest.raises(EngineFailure, match="closed the connection"):
        Client(url, 1.0).post("/x")  # the server is gone


@pytest.mark.parametrize("url", ["localhost:3000", "https://host:1", "http://host", ""])
def test_a_malformed_url_is_rejected(url: str) -> None:
    with pytest.raises(UserError, match="http://host:port"):
        Client(url, 1.0)


def test_a_missing_environment_is_an_error_before_any_write(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = RECIPES / "quickstart_sglang.yaml"
    arguments = ["train", str(recipe), f"run.dir={tmp_path / 'run'}", "rollout.sglang.python=/no/python"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "rollout.sglang.python=/no/python does not exist; create that environment with" in error
    assert not (tmp_path / "run").exists()


def test_a_tensor_handle_identifies_its_gpu_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "0123-4567"

    class OnGpu(torch.Tensor):
        is_cuda = True

    handle = (torch.Tensor, (3,), (1,), 0, torch.UntypedStorage, torch.float32, 5, b"handle")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)

    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (print, handle))
    _, arguments = _handle(torch.zeros(3).as_subclass(OnGpu))
    assert arguments == (*handle[:6], "0123-4567", b"handle")
    _, arguments = _handle(torch.zeros(3))
    assert arguments == handle


def test_shared_tensors_are_sent_as_shared_memory_handles() -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")
    shared = torch.arange(4.0).share_memory_()
    ((name, received),) = pickle.loads(base64.b64decode(pickled([("weight", shared.view(2, 2))])))
    assert name == "weight" and received.shape == (2, 2)
    shared[0] = 9
    assert received[0, 0] == 9  # the same memory


PORT_TAKEN_ONCE = """#!{python}
import http.server, pathlib, sys, time
first = pathlib.Path({marker!r})
if not first.exists():
    first.touch()
    print("ERROR: [Errno 98] error while attempting to bind on address: address already in use", flush=True)
    time.sleep(60)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""


def test_a_server_whose_port_is_taken_starts_on_another(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PORT_TAKEN_ONCE.format(python=sys.executable, marker=str(tmp_path / "started")))
    python.chmod(0o755)
    config = small_config("rollout.engine=sglang", f"rollout.sglang.python={python}")
    server = Server(config, tmp_path, tmp_path / "server.log", "server", None)
    server.start(lambda line: None)
    try:
        assert (tmp_path / "started").exists() and server.is_alive()
        assert 20000 <= int(server.url.rsplit(":", 1)[1]) < 32768
    finally:
        server.stop()


def test_an_allocator_without_shareable_memory_is_rejected() -> None:
    check_allocator({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    with pytest.raises(UserError, match="expandable_segments"):
        check_allocator({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,expandable_segments: True"})
