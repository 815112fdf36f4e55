"""A tiny policy and tiny batches for tests on Megatron-Core."""

from __future__ import annotations

import random

import torch

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config import Config, load_config
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.policy.policy import Policy
from opo_megatron.weights.random_init import random_weights
from tests.support.paths import RECIPES

RECIPE = RECIPES / "quickstart.yaml"
VOCAB_SIZE = 17

SMALL_MODEL = (
    "policy.model.num_layers=4",
    "policy.model.hidden_size=32",
    "policy.model.ffn_hidden_size=48",
    "policy.model.num_query_groups=2",
    "policy.model.qk_layernorm=true",
    "policy.max_tokens_per_micro_batch=128",
    "policy.head_chunk_tokens=16",
)
BIG = (
    "policy.dtype=bf16",
    "policy.model.hidden_size=256",
    "policy.model.kv_channels=128",
    "policy.model.ffn_hidden_size=512",
    "policy.model.num_query_groups=2",
)
"""A model all of whose matrices consist of FP8 blocks."""
CORRECT = "on_policy.action=correct"
BLOCKWISE = (*BIG, "policy.fp8=blockwise", CORRECT)


def small_config(*overrides: str, world_size: int = 1) -> Config:
    """The quickstart with a model of a few thousand parameters."""
    return load_config(RECIPE, ["run.dir=unused", *SMALL_MODEL, *overrides], world_size)


def small_policy(config: Config, parallel: Parallel) -> Policy:
    """The policy of `config` with random initial weights."""
    weights = random_weights(config.policy.model, VOCAB_SIZE, config.run.seed)
    return Policy(config, VOCAB_SIZE, parallel, config.optimizer, weights)


def ragged_rollouts(count: int = 24, seed: int = 0) -> Rollouts:
    """Random prompts of 1 to 12 tokens, responses of 1 to 20, random rewards, four samples per group."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 12))] for _ in range(count // 4)]
    responses = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))] for _ in range(count)]
    rollouts = Rollouts.from_demonstrations([prompts[i // 4] for i in range(count)], responses)
    rollouts.is_demonstration = False
    rollouts.groups = torch.arange(count) // 4
    rollouts.rewards = torch.tensor([float(rng.random() < 0.5) for _ in responses], dtype=torch.float64)
    return rollouts
