"""A local engine with random weights, and requests for it."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.rollout.engine import GenerationRequest
from opo_megatron.rollout.local.engine import LocalEngine
from opo_megatron.weights.param_mapping import hf_shapes
from opo_megatron.weights.random_init import random_weights
from tests.support.hf_models import VOCAB_SIZE

STOP = 0


def weights_of(model: ModelConfig, sharpness: float = 1.0) -> dict[str, Tensor]:
    """Random weights by Hugging Face name; norms are random too, so that swapped ones are detected.

    `sharpness` above 1 makes the distributions less uniform than those of an untrained model.
    """
    source = random_weights(model, VOCAB_SIZE, seed=3)
    weights = {name: source(name) for name in hf_shapes(model, VOCAB_SIZE)}
    generator = torch.Generator().manual_seed(4)
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            weights[name] = 1 + 0.3 * torch.randn(tensor.shape, generator=generator)
    weights["model.norm.weight"] *= sharpness
    return weights


def engine_of(model: ModelConfig, slots: int = 16, sharpness: float = 1.0) -> LocalEngine:
    engine = LocalEngine(model, VOCAB_SIZE, torch.float32, torch.device("cpu"), slots)
    named = list(weights_of(model, sharpness).items())
    engine.update_weights([named[:5], named[5:]], version=7)
    return engine


def some_requests(
    prompts: int, samples: int = 1, longest: int = 12, seed: int = 0
) -> list[GenerationRequest]:
    rng = random.Random(seed)
    tokens = [
        tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))) for _ in range(prompts)
    ]
    return [GenerationRequest(1000 + p, p, s, tokens[p]) for p in range(prompts) for s in range(samples)]
