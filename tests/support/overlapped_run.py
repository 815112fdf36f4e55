"""A tiny run whose steps overlap with the generation of a streaming engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opo_megatron.build import open_run
from opo_megatron.config import load_config
from opo_megatron.config.choices import OverlapOrder
from opo_megatron.run import Run
from tests.support.fixtures import RECIPE
from tests.support.streamed_engine import StreamedEngine
from tests.support.tiny_run import ONE_STEP, TINY

OVERLAP = ("policy.max_tokens_per_micro_batch=64", "algorithm.loss_normalizer=tokens")


@contextmanager
def a_run(folder: Path, *overrides: str, seed: int | None = None, order: str = "arrival") -> Iterator[Run]:
    """A run from random weights; with a seed its engine streams, and the step overlaps."""
    config = load_config(RECIPE, [f"run.dir={folder}", *TINY, *ONE_STEP, *OVERLAP, *overrides])
    with open_run(config) as run:
        run.generation.synchronize()
        run.step = 0
        if seed is not None:
            config.rollout.overlap, config.rollout.overlap_order = True, OverlapOrder(order)
            run.generation.engine = StreamedEngine(run.generation.engine, seed)  # type: ignore[assignment]
        yield run
