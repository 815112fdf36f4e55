"""Random initial weights, the same under every parallel layout: every tensor has its own seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.weights.param_mapping import hf_shapes

EMBEDDING_STD = 0.02
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


def random_weights(model: ModelConfig, vocab_size: int, seed: int) -> Callable[[str], Tensor]:
    """A `WeightSource`: Hugging Face name → full tensor.

    Norms are 1, biases 0.  The embedding is N(0, 0.02²), matrices are N(0, 1/fan_in).  Projections into the
    residual stream are divided by √(2·layers), so that its variance does not grow with depth.
    """
    shapes = hf_shapes(model, vocab_size)

    def tensor(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = EMBEDDING_STD if name == "model.embed_tokens.weight" else 1 / math.sqrt(shape[1])
        if name.endswith(_RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * model.num_layers)
        return torch.randn(shape, generator=generator) * std

    return tensor
