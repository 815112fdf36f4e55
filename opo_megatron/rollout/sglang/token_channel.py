"""The token channel: a server sends every token of a call as it is sampled, whether its response ends or not.

A reply over HTTP comes when a response ends.  Where a server dies, those that had ended would be known and
the others not: keeping what is known would favour short responses.  Here all responses of a batch send their
new tokens in one message per forward pass.  So wherever a channel is cut, that is one time of death for all
of them (`received.py`).

In the scheduler's process a hook on SGLang's output streamer packs the new tokens of requests whose id is
`request_id(call, index)` and pushes them; in the HTTP process `TokenChannel` hands them to whoever reads
`GET /opo/tokens?call=…`.  Neither parses a token.  SGLang's own streaming takes a hundred microseconds of its
one tokenizer process per token, a message here some tens per forward pass.

The trainer imports the format; SGLang and zmq, which its environment need not have, are imported inside.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

PATH = "/opo/tokens"
RECORD = struct.Struct("<IIiif")
"""index in the call, position in the response, token, weight version, log-probability: of one token."""
HEADER = b"opo-tokens-1".ljust(RECORD.size)
"""Sent when a channel is open; another format would have another number."""
UNKNOWN_VERSION = -1
VARIABLE = "OPO_TOKEN_CHANNEL"
"""Where it is set, a server has the channel; its processes find there the address at which they meet."""
REMEDY = "install the version of `make setup-sglang`, or set rollout.sglang.continue_responses=false"
_PREFIX = "opo-"
_REQUEST_ID = re.compile(_PREFIX + r"([0-9a-f]{1,32})-([0-9]{1,9})")
_LARGEST_VERSION = 2**31 - 1


def request_id(call: str, index: int) -> str:
    """SGLang's id of a request whose tokens go to the channel of this call."""
    return f"{_PREFIX}{call}-{index}"


# ---------------------------------------------------------------------- in the scheduler's process


class Sender:
    """Sends the tokens of a batch that were not sent yet: one message, with a part for each call."""

    def __init__(self, send: Callable[[list[bytes]], None]) -> None:
        """Args:
        send: takes call, records, call, records, …; it must not block.
        """
        self._send = send

    def send(self, requests: Sequence[Any], version: int) -> None:
        """Args:
        requests: SGLang's, after their new tokens were appended; those of a retracted one are not lost.
        """
        version = version if version <= _LARGEST_VERSION else UNKNOWN_VERSION
        records: dict[str, list[bytes]] = {}
        for request in requests:
            if request.rid.startswith(_PREFIX) and request.return_logprob:
                self._pack(request, version, records)
        if records:
            self._send([part for call, new in records.items() for part in (call.encode(), b"".join(new))])

    def _pack(self, request: Any, version: int, records: dict[str, list[bytes]]) -> None:
        sent = getattr(request, "opo_sent", 0)
        tokens, log_probs = request.output_ids_through_stop, request.logprob.output_token_logprobs_val
        count = min(len(tokens), len(log_probs))
        if count <= sent or (name := _REQUEST_ID.fullmatch(request.rid)) is None:
            return
        new, index = records.setdefault(name[1], []), int(name[2])
        for position in range(sent, count):
            new.append(RECORD.pack(index, position, tokens[position], version, log_probs[position]))
        request.opo_sent = count


def run_scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process, with the hook."""
    import zmq
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
    from sglang.srt.runtime_context import get_serving

    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.set_hwm(0)  # a scheduler never waits for a reader
    socket.connect(os.environ[VARIABLE])
    sender = Sender(functools.partial(socket.send_multipart, flags=zmq.NOBLOCK))
    original = SchedulerOutputStreamer._stream_output_generation

    def stream(streamer: Any, reqs: Sequence[Any], *others: Any, **named: Any) -> None:
        if streamer.send_to_detokenizer.socket is not None:  # of several ranks, the one that replies
            sender.send(reqs, version_number(get_serving().weight_version))
        original(streamer, reqs, *others, **named)

    SchedulerOutputStreamer._stream_output_generation = stream
    return run_scheduler_process(*args, **kwargs)


def version_number(version: Any) -> int:
    """A weight version as it is reported, or `UNKNOWN_VERSION`."""
    text = str(version)
    return int(text) if text.isdecimal() else UNKNOWN_VERSION


# ---------------------------------------------------------------------- in the HTTP process


class TokenChannel:
    """The ASGI application with `PATH`; everything else goes to `app`."""

    def __init__(self, app: Any, receive: Callable[[], Any], begin: Callable[[], None]) -> None:
        """Args:
        receive: awaits the next message of a scheduler.
        begin: called at the first request.
        """
        self._app, self._receive, self._begin, self._has_begun = app, receive, begin, False
        self._queues: dict[str, asyncio.Queue[bytes | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if not self._has_begun and scope["type"] == "http":
            self._has_begun = True
            self._begin()
        if scope["type"] != "http" or scope["method"] != "GET" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        call = parse_qs(scope["query_string"].decode()).get("call", [""])[0]
        queue = self._queues[call] = asyncio.Queue()
        if self._task is None:  # here, because it needs the running loop
            self._task = asyncio.create_task(self._distribute())
        reader_left = asyncio.create_task(_end_when_disconnected(receive, queue))
        try:
            headers = [(b"content-type", b"application/octet-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await _send_all(queue, send)
        finally:
            reader_left.cancel()
            self._queues.pop(call, None)

    async def _distribute(self) -> None:
        while True:
            parts = await self._receive()
            for call, records in zip(parts[::2], parts[1::2], strict=True):
                if (queue := self._queues.get(call.decode())) is not None:
                    queue.put_nowait(records)


async def _send_all(queue: asyncio.Queue[bytes | None], send: Any) -> None:
    """Send the header, then what comes, until None comes."""
    body: list[bytes | None] = [HEADER]
    while None not in body:
        await send({"type": "http.response.body", "body": b"".join(filter(None, body)), "more_body": True})
        body = [await queue.get()]
        while not queue.empty():
            body.append(queue.get_nowait())


async def _end_when_disconnected(receive: Any, queue: asyncio.Queue[bytes | None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    queue.put_nowait(None)


def install(http_server: Any, arguments: Any) -> None:
    """Give a server the channel, where it has one scheduler's node and one HTTP process.

    Exits with one sentence where this SGLang lacks what it needs.

    Args:
        http_server: SGLang's module, before its server is started.
        arguments: the server's.
    """
    if getattr(arguments, "tokenizer_worker_num", 1) != 1 or getattr(arguments, "nnodes", 1) != 1:
        return
    if (missing := _missing(http_server)) is not None:
        sys.exit(
            f"this SGLang has no {missing}, by which a server sends tokens as they are sampled; {REMEDY}"
        )
    import zmq
    import zmq.asyncio

    folder = Path(tempfile.mkdtemp(prefix="opo-tokens-"))  # its owner's alone
    os.environ[VARIABLE] = f"ipc://{folder / 'socket'}"
    socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
    socket.set_hwm(0)
    socket.bind(os.environ[VARIABLE])
    # Schedulers are connected when a server answers; one that is killed later would leave the folder.
    remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    http_server.app.add_middleware(TokenChannel, receive=socket.recv_multipart, begin=remove)
    http_server.launch_server = functools.partial(
        http_server.launch_server, run_scheduler_process_func=run_scheduler
    )


def _missing(http_server: Any) -> str | None:
    """What this SGLang lacks."""
    if "run_scheduler_process_func" not in inspect.signature(http_server.launch_server).parameters:
        return "parameter run_scheduler_process_func of launch_server"
    name = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
    try:
        from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
        from sglang.srt.runtime_context import get_serving  # noqa: F401
    except ImportError:
        return name
    return None if hasattr(SchedulerOutputStreamer, "_stream_output_generation") else name
