"""Elements of a model's tensors by kind, counted once per model: the search asks again and again."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from opo_megatron.config.schema import ModelConfig
from opo_megatron.weights.param_mapping import EMBEDDING, HEAD, hf_shapes, is_expert


@dataclass(frozen=True)
class Sizes:
    """Elements."""

    embedding: int
    head: int
    """0 where it is tied to the embedding."""
    matrices: int
    """The others, experts' aside."""
    experts: int
    vectors: int

    @property
    def all_matrices(self) -> int:
        return self.embedding + self.head + self.matrices + self.experts


def sizes_of(model: ModelConfig, vocab_size: int) -> Sizes:
    """The elements of a model with this many rows in its embedding."""
    return _counted(_Key(model), vocab_size)


class _Key:
    """A model by its values: configurations are mutable, so they have no hash."""

    def __init__(self, model: ModelConfig) -> None:
        self.model, self._text = model, repr(model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=8)
def _counted(key: _Key, vocab_size: int) -> Sizes:
    totals: Counter[str] = Counter()
    for name, shape in hf_shapes(key.model, vocab_size).items():
        kind = "matrices" if len(shape) == 2 else "vectors"
        kind = {EMBEDDING: "embedding", HEAD: "head"}.get(name, "experts" if is_expert(name) else kind)
        totals[kind] += math.prod(shape)
    kinds = ("embedding", "head", "matrices", "experts", "vectors")
    return Sizes(*(totals[kind] for kind in kinds))
