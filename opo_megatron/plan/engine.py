"""Memory of a rollout engine on each GPU: its copy of the weights, and the KV cache.

    KV bytes per token = 2 · layers · max(1, groups / TP) · head_dim · bytes per element

As SGLang 0.5.21 computes it: weights and cache together take the fraction `mem-fraction-static` of the memory
that is free at its start.  The local engine holds everything on every rank, always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from opo_megatron.config.choices import Dtype, EngineName
from opo_megatron.config.schema import Config
from opo_megatron.plan.hardware import Gpu, constant
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.sizes import sizes_of


@dataclass(frozen=True)
class EnginePlan:
    """Per GPU, in bytes unless documented otherwise."""

    engines: int
    tensor_parallel_size: int
    weights: int
    token: int
    """Keys and values of one token."""
    cache: int
    """Size of the KV cache."""
    working: int
    """Working memory during generation."""
    running: int
    """Concurrent responses of one engine."""
    always: bool = False
    """Whether it is held during training, too."""

    @property
    def cached_tokens(self) -> int:
        """Tokens that fit into an engine's KV cache."""
        return self.cache // self.token if self.token else 0


def generates_in_fp8(config: Config) -> bool:
    return bool(config.rollout.sglang.fp8) and config.rollout.engine is EngineName.sglang


def kv_bytes_per_token(config: Config, tensor_parallel_size: int) -> int:
    """On each GPU of an engine."""
    model = config.policy.model
    assert model.num_query_groups is not None and model.kv_channels is not None
    groups = max(1, model.num_query_groups // tensor_parallel_size)
    return 2 * model.num_layers * groups * model.kv_channels * _itemsize(config)


def weight_bytes(config: Config, vocab_size: int, tensor_parallel_size: int, experts: bool = False) -> int:
    """On each GPU of an engine; vectors are replicated, matrices are sharded.

    Args:
        experts: only the experts' weights.
    """
    sizes, itemsize = sizes_of(config.policy.model, vocab_size), _itemsize(config)
    block = 1 if generates_in_fp8(config) else itemsize
    if experts:
        return sizes.experts * block // tensor_parallel_size
    matrices = (sizes.matrices + sizes.experts) * block + (sizes.embedding + sizes.head) * itemsize
    return matrices // tensor_parallel_size + sizes.vectors * itemsize


def plan_engine(
    config: Config, vocab_size: int, lengths: Lengths, gpus: int, gpu: Gpu, policy_parameters: int
) -> EnginePlan:
    """The engine of a recipe, next to a policy that holds `policy_parameters` bytes during generation."""
    settings = config.rollout.sglang
    if config.rollout.engine is EngineName.local:
        token = kv_bytes_per_token(config, 1)
        running = min(config.rollout.local.slots, math.ceil(lengths.samples / gpus))
        longest = lengths.longest_prompt + lengths.longest_response
        weights = weight_bytes(config, vocab_size, 1)
        return EnginePlan(gpus, 1, weights, token, running * longest * token, 0, running, always=True)
    size = settings.tensor_parallel_size
    engines = max(1, gpus // size)
    running = min(settings.max_running_requests or lengths.samples, math.ceil(lengths.samples / engines))
    token = kv_bytes_per_token(config, size)
    if settings.urls:
        return EnginePlan(len(settings.urls), size, 0, token, 0, 0, running)
    weights = weight_bytes(config, vocab_size, size)
    free = gpu.memory - constant("reserved") - policy_parameters
    working = int((512 + 1.5 * constant("engine_working_tokens") + size / 8 * 1024) * 2**20)
    share = settings.options.get("mem_fraction_static")
    pool = free - working if share is None else free * float(share)
    needed = running * (lengths.longest_prompt + lengths.longest_response) * token
    cache = max(0, int(min(pool - weights, needed) if share is None else pool - weights))
    return EnginePlan(engines, size, weights, token, cache, working, running)


def _itemsize(config: Config) -> int:
    return 2 if config.policy.dtype is Dtype.bf16 else 4
