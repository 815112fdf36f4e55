"""Generation posts to servers: each goes to the server with the fewest outstanding tokens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from opo_megatron.config.schema import Config
from opo_megatron.errors import EngineFailure
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.continuation import Call
from opo_megatron.rollout.sglang.replies import generate_body
from opo_megatron.rollout.sglang.routed_experts import unpack_experts


class Balance:
    """The posts of one call of the engine; safe to use from several threads."""

    def __init__(self, clients: Sequence[Client], config: Config) -> None:
        self._lock, self._config = threading.Lock(), config
        self._outstanding = dict.fromkeys(clients, 0)

    def post_call(self, call: Call, indices: Sequence[int]) -> dict[int, Any]:
        """Index → reply, of some requests of a call; raises as `post`."""
        received = call.received
        requests, prefixes = [received.requests[i] for i in indices], received.prefixes(indices)
        exact = self._config.rollout.sglang.exact
        body = generate_body(requests, received.sampling, exact, prefixes=prefixes) | call.names(indices)
        client, replies = self._post(requests, received.sampling, body)
        return {
            i: received.merged(i, reply, client.url, client.timeout)
            for i, reply in zip(indices, replies, strict=True)
        }

    def post(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        trace: bool = False,
        no_graph: bool = False,
        sampled: Sequence[int] | None = None,
    ) -> list[Any]:
        """One reply per request, in that order; see `generate_body`.

        Raises:
            EngineFailure: the server did not answer, or not completely.
            UserError: it refuses the requests, or does not return what they ask for.
        """
        exact = self._config.rollout.sglang.exact
        body = generate_body(requests, sampling, exact, trace, no_graph=no_graph, sampled=sampled)
        return self._post(requests, sampling, body)[1]

    def _post(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, body: dict[str, Any]
    ) -> tuple[Client, list[Any]]:
        tokens = sum(len(request.tokens) + sampling.max_tokens for request in requests)
        with self._on_least_busy(tokens) as client:
            reply = client.post("/generate", **body)
        if not isinstance(reply, list) or len(reply) != len(requests):
            raise EngineFailure(f"{client.url} did not return {len(requests)} responses for as many prompts")
        if sampling.routed_experts:  # here, in the post's own thread, because they are most of a reply
            unpack_experts(requests, reply, self._config.policy.model)
        return client, reply

    @contextlib.contextmanager
    def _on_least_busy(self, tokens: int) -> Iterator[Client]:
        with self._lock:
            client = min(self._outstanding, key=lambda one: self._outstanding[one])
            self._outstanding[client] += tokens
        try:
            yield client
        finally:
            with self._lock:
                self._outstanding[client] -= tokens
