"""The token channel of a server: what its scheduler sends, and what a reader of a call gets."""

from __future__ import annotations

import asyncio
import math
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from opo_megatron.rollout.sglang import token_channel
from opo_megatron.rollout.sglang.token_channel import (
    HEADER,
    PATH,
    RECORD,
    Sender,
    TokenChannel,
    request_id,
    version_number,
)

CALL = "0a" * 16


def request(rid: str, ids: list[int], **fields: Any) -> Any:
    log_probs = SimpleNamespace(output_token_logprobs_val=[-0.5 * one for one in ids])
    known = {"rid": rid, "return_logprob": True, "output_ids_through_stop": array("q", ids)}
    return SimpleNamespace(**known | {"logprob": log_probs} | fields)


def sent(*batches: list[Any], version: int = 7) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """(call, records) of every message."""
    messages: list[list[bytes]] = []
    sender = Sender(messages.append)
    for batch in batches:
        sender.send(batch, version)
    return [
        (call.decode(), list(RECORD.iter_unpack(records)))
        for parts in messages
        for call, records in zip(parts[::2], parts[1::2], strict=True)
    ]


def test_all_responses_of_a_batch_send_their_new_tokens_in_one_message() -> None:
    batch = [request(request_id(CALL, i), [i + 1]) for i in (0, 5)]
    assert sent(batch) == [(CALL, [(0, 0, 1, 7, -0.5), (5, 0, 6, 7, -3.0)])]


def test_a_token_is_sent_once_also_after_a_retraction() -> None:
    one = request(request_id(CALL, 0), [4, 4])
    sender_sees = sent([one], [one], [one])  # retracted, prefilled again: its tokens are those it had
    assert sender_sees == [(CALL, [(0, 0, 4, 7, -2.0), (0, 1, 4, 7, -2.0)])]
    one.output_ids_through_stop.append(2)
    one.logprob.output_token_logprobs_val.append(-1.0)
    assert sent([one]) == [(CALL, [(0, 2, 2, 7, -1.0)])]


@pytest.mark.parametrize(
    "one",
    [
        request("5f1c", [1]),
        request("opo-", [1]),
        request(f"opo-{CALL}-x", [1]),
        request(f"opo-{CALL}-9999999999", [1]),
        request(f"opo-{'z' * 32}-1", [1]),
        request(request_id(CALL, 0), []),
        request(request_id(CALL, 0), [1], return_logprob=False, logprob=None),
    ],
)
def test_requests_of_others_send_nothing(one: Any) -> None:
    assert sent([one]) == []


@pytest.mark.parametrize(
    ("version", "number"),
    [("12", 12), (None, -1), ("default", -1), ("-3", -1), ("4.0", -1), ("20261128123456", 20261128123456)],
)
def test_a_version_is_a_number_or_unknown(version: Any, number: int) -> None:
    assert version_number(version) == number
    ((_, [record]),) = sent([request(request_id(CALL, 0), [1])], version=number)
    assert record[3] == (number if number < 2**31 else -1)


@pytest.mark.parametrize("log_prob", [0.0, -1e-30, -math.inf, math.nan])
def test_log_probabilities_are_sent_as_they_are(log_prob: float) -> None:
    one = request(request_id(CALL, 0), [1])
    one.logprob.output_token_logprobs_val = [log_prob]
    ((_, [record]),) = sent([one])
    assert record[4] == pytest.approx(log_prob, nan_ok=True, rel=1e-6)


def scope(path: str = PATH, call: str = CALL, method: str = "GET") -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "query_string": f"call={call}".encode()}


async def read(
    channel: TokenChannel, messages: asyncio.Queue[Any], arrives: list[list[bytes]], call: str = CALL
) -> bytes:
    """What a reader gets that leaves after these messages."""
    body, left, opened = b"", asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(event: dict[str, Any]) -> None:
        nonlocal body
        body += event.get("body", b"")
        opened.set()

    reader = asyncio.create_task(channel(scope(call=call), receive, send))
    await opened.wait()
    for message in arrives:
        messages.put_nowait(message)
    for _ in range(20):
        await asyncio.sleep(0)
    left.set()
    await reader
    return body


def run(arrives: list[list[bytes]], calls: tuple[str, ...] = (CALL,)) -> list[bytes]:
    async def main() -> list[bytes]:
        messages: asyncio.Queue[Any] = asyncio.Queue()
        channel = TokenChannel(None, messages.get, lambda: None)
        return [await read(channel, messages, arrives, call) for call in calls]

    return asyncio.run(main())


def test_a_reader_gets_the_records_of_its_call_alone_in_order() -> None:
    arrives = [
        [CALL.encode(), b"one "],
        [b"other", b"none", CALL.encode(), b"two "],
        [CALL.encode(), b"three"],
    ]
    assert run(arrives) == [HEADER + b"one two three"]
    assert run(arrives, (CALL, "other")) == [HEADER + b"one two three", HEADER + b"none"]


def test_other_paths_are_the_servers_own() -> None:
    seen = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append((scope["type"], scope.get("method"), scope.get("path")))

    begun: list[int] = []
    channel = TokenChannel(app, None, lambda: begun.append(len(seen)))  # type: ignore[arg-type]
    others = [{"type": "lifespan"}, scope("/generate"), scope(PATH + "/x"), scope(method="POST")]
    for one in others:
        asyncio.run(channel(one, None, None))
    assert begun == [1], "at the first request, once"
    assert seen == [(one["type"], one.get("method"), one.get("path")) for one in others]


def arguments(**others: int) -> Any:
    return SimpleNamespace(**{"tokenizer_worker_num": 1, "nnodes": 1} | others)


def test_an_sglang_without_what_the_channel_hooks_ends_with_one_sentence() -> None:
    module = SimpleNamespace(launch_server=lambda server_args: None)
    with pytest.raises(
        SystemExit, match=r"has no parameter run_scheduler_process_func .*; install the version"
    ):
        token_channel.install(module, arguments())
    module.launch_server = lambda server_args, run_scheduler_process_func=None: None
    with pytest.raises(
        SystemExit, match=r"has no sglang\.\S*SchedulerOutputStreamer, .*continue_responses=false"
    ):
        token_channel.install(module, arguments())  # SGLang is not installed here


@pytest.mark.parametrize("others", [{"nnodes": 2}, {"tokenizer_worker_num": 2}])
def test_a_server_of_several_processes_has_no_channel(others: dict[str, int]) -> None:
    token_channel.install(None, arguments(**others))
