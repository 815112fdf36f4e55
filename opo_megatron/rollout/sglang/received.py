"""The tokens of one call of the engine as they are received, and the rule by which they are kept.

Where a server dies, the received tokens of all responses stay, and nothing else: a response counts as ended
where its received tokens say so, whether its reply came or not, and every other one is continued from
exactly its received tokens.  Let y<t be what is received of a response at the death.  The next token is then
sampled from π(·|prompt, y<t), as it would have been:

    P(y) = P(y<t) · Π_{s≥t} π(y_s | y<s)

so a response has the probability that it has without a death, at whatever time that comes.  Where instead a
response is kept because it has ended, and of the others fewer tokens are known, short ones are favoured.
The limit: a death that is caused by the tokens that it loses, which are sampled again, selects against them.

A reply is therefore merged only when its tokens have been received too, which takes microseconds.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from opo_megatron.errors import EngineFailure
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.client import Client, Stream
from opo_megatron.rollout.sglang.replies import spans_of, versions_of
from opo_megatron.rollout.sglang.token_channel import HEADER, PATH, RECORD

ABORT = "abort"
"""Type of the reply of a request that was ended from outside."""
Record = tuple[int, int, int, int, float]
"""index in the call, position in the response of this call, token, weight version, log-probability."""


class Tokens(NamedTuple):
    """Tokens of a response from its beginning, with what a reply says of each."""

    ids: array[int]
    versions: array[int]
    log_probs: array[float]

    @staticmethod
    def none() -> Tokens:
        return Tokens(array("i"), array("i"), array("f"))

    def copy(self) -> Tokens:
        return Tokens(self.ids[:], self.versions[:], self.log_probs[:])


def finish_reason(ids: Sequence[int], sampling: Sampling) -> dict[str, Any] | None:
    """How a response with these tokens has ended, as SGLang reports it; None where it has not."""
    if ids and ids[-1] in sampling.stop_tokens:
        return {"type": "stop", "matched": ids[-1]}
    return {"type": "length", "length": len(ids)} if len(ids) >= sampling.max_tokens else None


class Received:
    """What has been received of the responses of one call; safe to use from several threads."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        kept: Mapping[GenerationRequest, Tokens] | None = None,
    ) -> None:
        """Args:
        requests: all different.
        kept: what an earlier call received of them.
        """
        self.requests, self.sampling = requests, sampling
        self.has_channels = True
        """Whether tokens come before replies do."""
        self._tokens = [kept[r].copy() if kept and r in kept else Tokens.none() for r in requests]
        self._begins = [len(tokens.ids) for tokens in self._tokens]
        self._changed = threading.Condition()
        self._failures: dict[str, str] = {}
        """Why no more tokens come from a server, by its address."""
        reasons = [finish_reason(tokens.ids, sampling) for tokens in self._tokens]
        self.pending = [i for i, reason in enumerate(reasons) if reason is None]
        """Indices of the requests whose responses had not ended when the call began."""
        self.ended = {
            i: self._reply(i, {"finish_reason": reason}, self._tokens[i].versions)
            for i, reason in enumerate(reasons)
            if reason is not None
        }
        """Replies to the others."""
        self._new_ends: list[int] = []

    def add(self, records: Iterable[Record]) -> None:
        """Enter records in the order in which they were sent.

        Raises:
            ValueError: for one that does not follow those before it.
        """
        with self._changed:
            for index, position, token, version, log_prob in records:
                tokens = self._tokens[index]
                if position != len(tokens.ids) - self._begins[index]:
                    raise ValueError(f"token {position} of response {index} does not follow those before it")
                tokens.ids.append(token)
                tokens.versions.append(version)
                tokens.log_probs.append(log_prob)
                if finish_reason(tokens.ids, self.sampling) is not None:
                    self._new_ends.append(index)
            self._changed.notify_all()

    def take_ended(self) -> dict[int, Any]:
        """Replies to the requests whose last token has been received since this was called before.

        A server replies to several requests at once, and when all of them have ended.
        """
        with self._changed:
            ended, self._new_ends = self._new_ends, []
        replies = {}
        for i in ended:
            reason = finish_reason(self._tokens[i].ids, self.sampling)
            replies[i] = self._reply(i, {"finish_reason": reason}, self._tokens[i].versions)
        return replies

    def fail(self, url: str, reason: str) -> None:
        """No more tokens come from this server."""
        with self._changed:
            self._failures.setdefault(url, reason)
            self._changed.notify_all()

    def kept(self) -> dict[GenerationRequest, Tokens]:
        """All that has been received."""
        return dict(zip(self.requests, self._tokens, strict=True))

    @property
    def new_tokens(self) -> int:
        """Tokens received in this call."""
        return sum(len(tokens.ids) for tokens in self._tokens) - sum(self._begins)

    def prefixes(self, indices: Iterable[int]) -> list[array[int]]:
        """Tokens that were received before this call."""
        return [self._tokens[i].ids[: self._begins[i]] for i in indices]

    def merged(self, index: int, reply: dict[str, Any], url: str, seconds: float) -> dict[str, Any]:
        """A server's reply, with the tokens that were received before this call.

        Args:
            seconds: after which tokens that the reply has, and the channel not, will not come.

        Raises:
            EngineFailure: where they do not come, or are others.
        """
        meta_info, begin = reply["meta_info"], self._begins[index]
        if meta_info["finish_reason"]["type"] == ABORT:  # a failure, as everywhere
            return reply
        if not self.has_channels and not begin:
            return reply
        ids, tokens = reply["output_ids"], self._tokens[index]
        log_probs = array("f", (value for value, *_ in meta_info.get("output_token_logprobs") or []))
        versions = versions_of(meta_info, len(ids))
        if not self.has_channels:
            self.add(
                (index, i, *of_token) for i, of_token in enumerate(zip(ids, versions, log_probs, strict=True))
            )
        with self._changed:
            self._changed.wait_for(
                lambda: url in self._failures or len(tokens.ids) >= begin + len(ids), seconds
            )
        if len(tokens.ids) < begin + len(ids):
            why = self._failures.get(url, f"did not send the tokens of a response for {seconds:g} seconds")
            raise EngineFailure(f"{url}{PATH} {why}")
        same = (
            tokens.ids[begin:].tolist() == ids and tokens.log_probs[begin:].tobytes() == log_probs.tobytes()
        )
        if not same:
            prompt = self.requests[index].prompt_id
            raise EngineFailure(f"{url}{PATH} sent other tokens than the reply to prompt {prompt} has")
        return self._reply(index, meta_info, [*tokens.versions[:begin], *versions]) if begin else reply

    def _reply(self, index: int, meta_info: dict[str, Any], versions: Sequence[int]) -> dict[str, Any]:
        tokens = self._tokens[index]
        log_probs = [[value, token, None] for value, token in zip(tokens.log_probs, tokens.ids, strict=True)]
        sampled = {"output_token_logprobs": log_probs, "weight_versions": spans_of(versions)}
        return {"output_ids": tokens.ids.tolist(), "meta_info": meta_info | sampled}


class Channel:
    """The open channel of a call with one server; close it."""

    def __init__(self, url: str, stream: Stream, received: Received) -> None:
        self._url, self._stream, self._received = url, stream, received
        self._thread = threading.Thread(target=self._receive, name="opo-tokens", daemon=True)
        self._thread.start()

    @staticmethod
    def open(client: Client, call: str, received: Received) -> Channel | None:
        """None where the server has no channel, or one of another format.

        Raises:
            EngineFailure, UserError: as any request.
        """
        stream = client.stream(f"{PATH}?call={call}")
        if stream is None:
            return None
        header = b""
        while len(header) < len(HEADER) and (new := stream.read()):
            header += new
        if header == HEADER:
            return Channel(client.url, stream, received)
        stream.close()
        if len(header) < len(HEADER):
            raise EngineFailure(f"{client.url}{PATH} closed the connection")
        return None

    def close(self) -> None:
        """Enter what has come, and no more."""
        self._stream.end()
        self._thread.join()
        self._stream.close()

    def _receive(self) -> None:
        rest = b""
        while new := self._stream.read():
            rest += new
            whole = len(rest) // RECORD.size * RECORD.size
            try:
                self._received.add(RECORD.iter_unpack(rest[:whole]))
            except (ValueError, IndexError) as error:
                self._received.fail(self._url, f"left tokens out: {error}")
                return
            rest = rest[whole:]
        self._received.fail(self._url, "closed the connection")
