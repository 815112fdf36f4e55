"""Calls of the engine over servers with and without a token channel, and servers that stop answering."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.balance import Balance
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.continuation import Continuation
from opo_megatron.rollout.sglang.server_checks import answering
from opo_megatron.rollout.sglang.token_channel import HEADER, PATH, RECORD
from tests.support.fixtures import small_config

SAMPLING = Sampling(max_tokens=8, stop_tokens=(0,), seed=(1,))
RESPONSES = [[3, 4, 0], [5, 6, 7, 8, 9, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
REQUESTS = [GenerationRequest(i, i, 0, (2,) * (i + 1)) for i in range(len(RESPONSES))]
VERSION = 3


class FakeServer:
    """Replies to /generate with RESPONSES; sends their tokens, and dies after some of them."""

    def __init__(
        self, header: bytes | None = HEADER, dies_after: int | None = None, records: int | None = None
    ) -> None:
        """Args:
        header: of its channel; None: it has none.
        dies_after: tokens of every response; it then closes all connections.
        records: how many of all are sent, default all.
        """
        self.header, self.dies_after, self.records = header, dies_after, records
        self.inputs: list[list[int]] = []
        self.channels: dict[str, Any] = {}
        self.ended = threading.Event()

    @contextmanager
    def run(self) -> Iterator[Client]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield Client(f"http://127.0.0.1:{server.server_port}", 5.0)
        finally:
            self.ended.set()
            server.shutdown()
            server.server_close()

    def handler(fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                if parts.path != PATH or fake.header is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.chunk(fake.header)
                fake.channels[parse_qs(parts.query)["call"][0]] = self
                fake.ended.wait()
                self.close_connection = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                replies = fake.generate(body)
                if replies is None:
                    fake.ended.set()
                    self.close_connection = True
                    return
                text = json.dumps(replies).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def chunk(self, part: bytes) -> None:
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                self.wfile.flush()

            def log_message(self, *args: Any) -> None:
                pass

        return Handler

    def generate(self, body: dict[str, Any]) -> list[Any] | None:
        replies, sent = [], []
        ids = body.get("rid") or [None] * len(body["input_ids"])
        for rid, ids_in, parameters in zip(ids, body["input_ids"], body["sampling_params"], strict=True):
            number = next(i for i in (2, 1, 0) if ids_in[: i + 1] == [2] * (i + 1))
            self.inputs.append(ids_in)
            begin = len(ids_in) - number - 1
            assert ids_in[number + 1 :] == RESPONSES[number][:begin]
            assert parameters["max_new_tokens"] == SAMPLING.max_tokens - begin
            tokens = RESPONSES[number][begin:][: self.dies_after]
            for position, token in enumerate(tokens):
                sent.append((rid, position, token))
            log_probs = [[-0.5, token, None] for token in tokens]
            kind = {"type": "stop" if tokens[-1] == 0 else "length"}
            known = {
                "output_token_logprobs": log_probs,
                "weight_version": str(VERSION),
                "finish_reason": kind,
            }
            replies.append({"output_ids": tokens, "meta_info": known})
        for rid, position, token in sent[: self.records]:
            if rid is not None:
                _, call, index = rid.split("-")
                record = RECORD.pack(int(index), position, token, VERSION, -0.5)
                self.channels[call].chunk(record[:7])  # networks cut records anywhere
                self.channels[call].chunk(record[7:])
        return None if self.dies_after else replies


def one_call(
    continuation: Continuation, clients: list[Client], requests: list[GenerationRequest] = REQUESTS
) -> list[list[int]]:
    """The responses of a call."""
    balance = Balance(clients, small_config())
    with continuation.call(requests, SAMPLING, VERSION, clients) as call:
        replies = dict(call.received.ended)
        for i in call.received.pending:
            replies |= balance.post_call(call, [i])
    return [replies[i]["output_ids"] for i in range(len(requests))]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_after_a_death_only_tokens_that_were_not_received_are_sampled(count: int) -> None:
    continuation, second = Continuation(True, pytest.fail), FakeServer()
    with FakeServer(dies_after=count).run() as client, pytest.raises(EngineFailure):
        one_call(continuation, [client])
    continuation.keep()
    kept = continuation.kept(SAMPLING, VERSION)
    assert kept is not None and 0 < kept.new_tokens <= count
    with second.run() as client:
        assert one_call(continuation, [client]) == RESPONSES
    begins = [len(tokens.ids) for tokens in kept.kept().values()]
    expected = [[2, *RESPONSES[0][: begins[0]]], [2, 2], [2, 2, 2]]
    assert second.inputs == (expected if begins[0] < len(RESPONSES[0]) else expected[1:])


def test_a_death_while_a_channel_opens_loses_nothing_of_the_death_before() -> None:
    continuation = Continuation(True, pytest.fail)
    with FakeServer(dies_after=2).run() as client, pytest.raises(EngineFailure):
        one_call(continuation, [client])
    for _ in range(2):
        continuation.keep()
        with pytest.raises(EngineFailure, match="closed the connection"):
            one_call(continuation, [client])  # it is gone
    continuation.keep()
    second = FakeServer()
    with second.run() as client:
        assert one_call(continuation, [client]) == RESPONSES
    assert second.inputs[0] == [2, 3, 4]


@pytest.mark.parametrize("header", [None, b"opo-tokens-9".ljust(RECORD.size), b"<html>" * 4])
def test_a_server_without_this_channel_is_used_without_and_named_once(header: bytes | None) -> None:
    logged: list[str] = []
    continuation = Continuation(True, logged.append)
    with FakeServer().run() as one, FakeServer(header).run() as other:
        for _ in range(2):
            assert one_call(continuation, [one, other]) == RESPONSES
            continuation.keep()
            assert continuation.kept(SAMPLING, VERSION) is None
    assert len(logged) == 1 and other.url in logged[0] and "does not send tokens" in logged[0]


def test_what_was_kept_is_continued_by_a_server_without_a_channel_too() -> None:
    """Other ranks have kept what had ended: to start over here would favour short responses."""
    continuation, second = Continuation(True, lambda line: None), FakeServer(None)
    with FakeServer(dies_after=2).run() as client, pytest.raises(EngineFailure):
        one_call(continuation, [client])
    continuation.keep()
    with second.run() as client:
        assert one_call(continuation, [client]) == RESPONSES
    assert second.inputs[0] == [2, 3, 4]
    continuation.keep()
    assert continuation.kept(SAMPLING, VERSION) is None


@pytest.mark.parametrize("records", [0, 1, 2])
def test_a_reply_whose_tokens_do_not_come_is_a_failure(records: int) -> None:
    continuation = Continuation(True, pytest.fail)
    with FakeServer(records=records).run() as client:
        client.timeout = 0.3
        with pytest.raises(EngineFailure, match=f"{PATH} did not send the tokens of a response"):
            one_call(continuation, [client])
    continuation.keep()
    kept = continuation.kept(SAMPLING, VERSION)
    assert kept is not None and kept.new_tokens == records


@pytest.mark.parametrize(
    ("is_enabled", "requests", "experts"),
    [(False, REQUESTS, False), (True, 2 * REQUESTS[:1], False), (True, REQUESTS, True)],
    ids=["switched-off", "equal-requests", "experts"],
)
def test_calls_that_cannot_be_continued_open_no_channel(
    is_enabled: bool, requests: list[GenerationRequest], experts: bool
) -> None:
    continuation = Continuation(is_enabled, pytest.fail)
    sampling = Sampling(8, (0,), (1,), routed_experts=experts)
    with continuation.call(requests, sampling, VERSION, [Client("http://127.0.0.1:9", 1.0)]) as call:
        assert call.names([0]) == {} and call.received.pending == list(range(len(requests)))
    continuation.keep()
    assert continuation.kept(sampling, VERSION) is None


@pytest.fixture
def alone() -> Parallel:
    parallel: Any = type("Parallel", (), {"rank": 0, "world_size": 1})()
    return parallel


@pytest.mark.parametrize("silent", [(0,), (1,), (2,), (0, 1), (0, 2)])
def test_servers_that_no_longer_answer_are_left_out(
    silent: tuple[int, ...], alone: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [Client(f"http://node-{i}:1", 1.0) for i in range(3)]
    monkeypatch.setattr(Client, "is_healthy", lambda self: clients.index(self) not in silent)
    monkeypatch.setattr("opo_megatron.rollout.sglang.server_checks.all_gather_objects", lambda _, one: [one])
    logged: list[str] = []
    left = answering(clients, alone, is_start=False, log=logged.append)
    assert left == [one for i, one in enumerate(clients) if i not in silent]
    names = ", ".join(clients[i].url for i in silent)
    assert logged == [f"{names} of rollout.sglang.urls does not answer; the run continues with the others"]
    with pytest.raises(
        UserError, match=rf"{clients[silent[0]].url} of .* does not answer; start it, or remove"
    ):
        answering(clients, alone, is_start=True, log=pytest.fail)


def test_without_any_server_left_the_run_ends(alone: Parallel, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [Client(f"http://node-{i}:1", 1.0) for i in range(2)]
    monkeypatch.setattr(Client, "is_healthy", lambda self: False)
    monkeypatch.setattr("opo_megatron.rollout.sglang.server_checks.all_gather_objects", lambda _, one: [one])
    with pytest.raises(UserError, match="does not answer, nor does any other; start one, then resume"):
        answering(clients, alone, is_start=False, log=pytest.fail)
