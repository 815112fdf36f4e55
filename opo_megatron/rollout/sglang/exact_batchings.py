"""The ways in which a server puts requests together, for the check of exact mode.

Everything that SGLang does with a cache happens here on purpose: prompts prefilled in chunks, prefixes from
the cache, and requests that are retracted while they run and prefilled again with what they have sampled.
On a GPU a server decodes in CUDA graphs, so the last batching is one without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import Any

from opo_megatron.errors import EngineFailure
from opo_megatron.rollout.engine import WITHOUT_GRAPHS, GenerationRequest
from opo_megatron.rollout.sglang.client import Client

ALONE = "one request at a time"
THREE = "three requests at once"
CHUNKED = "with prompts prefilled in chunks"
CACHED = "with prompts from the prefix cache"
RETRACTED = "with retracted requests"
BATCHINGS = (ALONE, THREE, CHUNKED, CACHED, RETRACTED, WITHOUT_GRAPHS)

FEW = 3
CHUNKS = 3
"""Prompts of the larger batchings fill this many chunks."""
MEAN_PROMPT = 16
"""Tokens, by which requests are counted that fill these chunks."""
FLUSH_SECONDS = 30
PAUSE_SECONDS = (0.03, 0.01, 0.003)
"""Time to the first retraction; shorter where all requests had ended by then."""
SLOWER = 1.5
"""Each retraction comes this many times later than the one before, so that requests end."""

Post = Callable[[Sequence[GenerationRequest]], list[Any]]
"""Sends requests to one server and returns its replies."""


def check_size(batching: str, chunk: int) -> tuple[int, int]:
    """Requests of a batching, and how many of them fill the context.

    Args:
        chunk: tokens that the server prefills at once.
    """
    if batching in (ALONE, THREE):
        return FEW, 2
    return FEW + -(-CHUNKS * max(chunk, MEAN_PROMPT) // MEAN_PROMPT), 2


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
        for seconds in PAUSE_SECONDS:
            replies = _interrupted(client, post, requests, seconds)
            if any(_info(reply, "num_retractions") for reply in replies):
                return replies
        raise EngineFailure(f"{client.url} retracted no request")
    replies = post(requests)
    if batching == CACHED and not any(_info(reply, "cached_tokens") for reply in replies):
        raise EngineFailure(f"{client.url} took no prompt from its prefix cache")
    return replies


def _interrupted(
    client: Client, post: Post, requests: Sequence[GenerationRequest], seconds: float
) -> list[Any]:
    """Replies to requests that are all retracted every so often until they end."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(post, requests)
        while True:
            try:
                return pending.result(seconds)
            except TimeoutError:
                client.post("/pause_generation", mode="retract")
                client.post("/continue_generation")
                seconds *= SLOWER


def _info(reply: Any, name: str) -> int:
    return int(reply["meta_info"].get(name) or 0)
