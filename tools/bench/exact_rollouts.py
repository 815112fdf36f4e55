"""Tokens per second of each engine with and without exact mode, for random weights and forced lengths.

Every engine generates responses of the same lengths to the same prompts; the best of some repetitions counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opo_megatron.config import Config, load_config
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.rollout.sglang.replies import generate_body
from opo_megatron.rollout.sglang.server import Server, write_model_config
from opo_megatron.weights.random_init import random_weights

VOCAB_SIZE = 203
CASES = {"384 × 12": (384, 14, 12), "48 × 60": (48, 130, 60), "1 × 60": (1, 14, 60)}
"""Responses × tokens → responses, tokens of a prompt, tokens of a response."""
SHAPE = ("num_layers=2", "num_attention_heads=4", "num_query_groups=2", "max_sequence_length=400")

Generate = Callable[[list[GenerationRequest], Sampling], object]


def tokens_per_second(recipe: Path, folder: Path, hidden: int, repeats: int) -> dict[str, dict[str, float]]:
    """[case][engine and mode] → tokens per second."""
    result: dict[str, dict[str, float]] = {case: {} for case in CASES}
    for engine, open_engine in (("local", _local), ("sglang", _server)):
        for mode in ("exact", "usual"):
            shape = (*SHAPE, f"hidden_size={hidden}", f"ffn_hidden_size={3 * hidden}")
            overrides = [f"policy.model.{setting}" for setting in shape]
            overrides += [f"run.dir={folder / engine / mode}", f"rollout.engine={engine}"]
            overrides.append(f"rollout.{engine}.exact={mode == 'exact'}")
            with open_engine(load_config(recipe, overrides, 1)) as generate:
                for case in CASES:
                    result[case][f"{engine}, {mode}"] = _best(generate, case, repeats)
    return result


def _best(generate: Generate, case: str, repeats: int) -> float:
    count, length, tokens = CASES[case]
    rng, seconds = random.Random(case), []
    for repeat in range(repeats + 1):  # the first one warms up
        prompts = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)) for _ in range(count)]
        requests = [GenerationRequest(i, i, repeat, prompt) for i, prompt in enumerate(prompts)]
        begin = time.monotonic()
        generate(requests, Sampling(tokens, (), (0,)))
        seconds.append(time.monotonic() - begin)
    return count * tokens / min(seconds[1:])


@contextmanager
def _local(config: Config) -> Iterator[Generate]:
    model, is_exact = config.policy.model, config.rollout.local.exact
    engine = LocalEngine(model, VOCAB_SIZE, torch.float32, torch.device("cpu"), 384, is_exact)
    source = random_weights(model, VOCAB_SIZE, 0)
    engine.update_weights([[(name, source(name)) for name in sorted(engine.decoder.names())]], 0)
    yield engine.generate


@contextmanager
def _server(config: Config) -> Iterator[Generate]:
    """A server with its dummy weights: what it computes takes as long as with any others."""
    folder, is_exact = Path(config.run.dir), config.rollout.sglang.exact
    write_model_config(config, VOCAB_SIZE, folder / "model")
    server = Server(config, folder / "model", folder / "server.log", "server", None)
    server.start(lambda line: None)
    client = server.client()
    try:
        yield lambda requests, sampling: client.post(
            "/generate", **generate_body(requests, sampling, is_exact)
        )
    finally:
        server.stop()
