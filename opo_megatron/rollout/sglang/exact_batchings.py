"""The ways in which a server puts requests together, for the check of exact mode.

Everything that SGLang does with a cache happens here on purpose: prompts prefilled in chunks, prefixes from
the cache, and requests that are retracted while they run and prefilled again with what they have sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import Any

from opo_megatron.errors import EngineFailure
from opo_megatron.rollout.engine import GenerationRequest
from opo_megatron.rollout.sglang.client import Client

ALONE = "one request at a time"
THREE = "three requests at once"
CHUNKED = "with prompts prefilled in chunks"
CACHED = "with prompts from the prefix cache"
RETRACTED = "with retracted requests"
BATCHINGS = (ALONE, THREE, CHUNKED, CACHED, RETRACTED)

FEW = 3
CHUNKS = 3
"""Prompts of the larger batchings fill this many chunks."""
MEAN_PROMPT = 16
"""Tokens, by which requests are counted that fill these chunks."""
FLUSH_SECONDS = 30
PAUSE_SECONDS = 0.03
"""Time to the first retraction; the next ones take longer, so that requests end."""

Post = Callable[[Sequence[GenerationRequest]], list[Any]]
"""Sends requests to one server and returns its replies."""


def check_size(batching: str, chunk: int) -> tuple[int, int]:
    """Requests of a batching, and how many of them fill the context.

    Args:
        chunk: tokens that the server prefills at once.
    """
    if batching in (ALONE, THREE):
        return FEW, 2
    return FEW + -(-CHUNKS * chunk // MEAN_PROMPT), 2


def replies_batched(
    client: Client, post: Post, requests: Sequence[GenerationRequest], batching: str
) -> list[Any]:
    """The replies of one server to `requests`, put together as `batching` says.

    Raises:
        EngineFailure: where the server did not do what was to be tested.
    """
    if batching != CACHED:
        client.post(f"/flush_cache?timeout={FLUSH_SECONDS}")
    if batching == ALONE:
        return [reply for request in requests for reply in post([request])]
    if batching == RETRACTED:
        return _retracted(client, post, requests)
    replies = post(requests)
    if batching == CACHED and not any(_info(reply, "cached_tokens") for reply in replies):
        raise EngineFailure(f"{client.url} took no prompt from its prefix cache")
    return replies


def _retracted(client: Client, post: Post, requests: Sequence[GenerationRequest]) -> list[Any]:
    with ThreadPoolExecutor(1) as thread:
        pending, seconds = thread.submit(post, requests), PAUSE_SECONDS
        while True:
            try:
                replies = pending.result(seconds)
                break
            except TimeoutError:
                client.post("/pause_generation", mode="retract")
                client.post("/continue_generation")
                seconds *= 1.5
    if not any(_info(reply, "num_retractions") for reply in replies):
        raise EngineFailure(f"{client.url} retracted no request")
    return replies


def _info(reply: Any, name: str) -> int:
    return int(reply["meta_info"].get(name) or 0)
