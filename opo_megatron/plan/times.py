"""The time of a step, phase by phase, from operations and bandwidths.

    training    (3 + passes + recompute) · (2·N·tokens + attention) · (1 + bubble) / (efficient peak · GPUs)
    bubble      (PP − 1) / (micro-batches · virtual stages), Megatron's schedules
    dispatch    (3 + passes + recompute − 1) · 2·k·H·tokens·layers · (EP − 1)/EP / link, with experts
    decoding    Σ over positions t of max( (weights + cache read at t) / bandwidth, 2·N·alive(t) / peak )
    host step   (gradients down, weights up) / host link + 28 bytes per parameter / host memory
    sync        bytes of the slowest rank per bucket over each link, and the engine's two copies

One constant, fitted to one published run, multiplies the sum for what is not counted (verifiers, imbalance,
Python, loading).  N counts the parameters that multiply a token: all matrices but the embedding, and only
the active experts; of a layer's E experts a decoding step of n responses reads 1 − (1 − k/E)ⁿ, as if tokens
chose them independently and uniformly.  Context parallelism is assumed to overlap its communication with
computation.  Evaluations and checkpoints are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from opo_megatron.config.schema import ModelConfig
from opo_megatron.plan.hardware import GPUS_PER_NODE, Gpu, constant
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.sync import SyncPlan
from opo_megatron.weights.param_mapping import EMBEDDING, hf_shapes, is_expert


@dataclass(frozen=True)
class Work:
    """The work of one step."""

    model: ModelConfig
    vocab_size: int
    gpus: int
    gpu: Gpu
    lengths: Lengths
    trained_tokens: float
    """With padding: of the fullest data-parallel rank, times the ranks."""
    bubble: float
    engine_tp: int
    engine_weights: int
    """Bytes per GPU of an engine."""
    engine_token: int
    """Bytes of keys and values of one token, per GPU."""
    running: int
    """Concurrent responses of an engine."""
    engines: int
    passes: float = 0.0
    """Forward passes in addition to the update's."""
    recomputes: bool = False
    trains_in_fp8: bool = False
    samples_per_prompt: int = 1
    engine_experts: int = 0
    """Those of `engine_weights` that belong to experts."""
    expert_parallel: int = 1
    tensor_parallel: int = 1
    """Of the policy."""

    @cached_property
    def active(self) -> int:
        """Parameters that multiply a token."""
        return active_parameters(self.model, self.vocab_size)


@dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    generation: float
    sync: float
    turns: float
    """Moving the optimizer to host memory and back."""
    host_step: float
    """The step of the optimizer's offloaded part."""
    training: float
    other: float
    tokens_per_gpu: float
    """Tokens/s/GPU of the whole step, prompts and responses."""
    training_tokens_per_gpu: float
    """The same for training alone."""

    @property
    def step(self) -> float:
        return self.generation + self.sync + self.turns + self.host_step + self.training + self.other


def active_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that multiply a token."""
    total = 0
    for name, shape in hf_shapes(model, vocab_size).items():
        if len(shape) != 2 or (name == EMBEDDING and not model.tie_embeddings):
            continue
        size = math.prod(shape)
        if is_expert(name):
            assert model.num_moe_experts is not None
            total += size * model.moe_router_topk // model.num_moe_experts
        else:
            total += size
    return total


def training_seconds(work: Work) -> float:
    """Forward, backward and additional passes, over all micro-batches."""
    model = work.model
    assert model.kv_channels is not None
    units = 3.0 + work.passes + (1.0 if work.recomputes else 0.0)
    sequence = work.lengths.prompt + work.lengths.response
    # Two products of scores over half a square, 2 operations each.
    attention = 2 * model.num_layers * model.num_attention_heads * model.kv_channels * sequence
    operations = units * work.trained_tokens * (2 * active_parameters(model, work.vocab_size) + attention)
    peak = work.gpu.fp8 if work.trains_in_fp8 else work.gpu.bf16
    seconds = operations / (peak * constant("training_efficiency") * work.gpus) + dispatch_seconds(work)
    return seconds * (1 + work.bubble)


def dispatch_seconds(work: Work) -> float:
    """Sending every token's hidden state in bf16 to its k experts and back, in each direction of a pass.

    A backward pass sends what its forward pass did.  Expert-parallel ranks are neighbours: NVLink, where
    they fit into a node.
    """
    model, size = work.model, work.expert_parallel
    if size == 1:
        return 0.0
    passes = 2.0 + work.passes + (1.0 if work.recomputes else 0.0)
    token = 2 * model.moe_router_topk * model.hidden_size * 2 * (size - 1) / size
    within = size * work.tensor_parallel <= GPUS_PER_NODE
    link = constant("nvlink" if within else "network") * constant("link_efficiency")
    return passes * token * model.num_layers * work.trained_tokens / work.gpus / link


def experts_read(model: ModelConfig, rows: float) -> float:
    """Share of a layer's experts that at least one of `rows` tokens chooses."""
    if model.num_moe_experts is None:
        return 1.0
    return float(1.0 - (1.0 - model.moe_router_topk / model.num_moe_experts) ** rows)


def decode_seconds(work: Work, rows: float, cached: float) -> float:
    """One decoding step of an engine: one token for each of `rows` responses, with `cached` tokens in all."""
    unread = work.engine_experts * (1 - experts_read(work.model, rows))
    read = work.engine_weights - unread + cached * work.engine_token
    operations = 2 * work.active * rows / work.engine_tp
    latency = 2 * work.model.num_layers * constant("decode_launch") if work.engine_tp > 1 else 0.0
    bandwidth = work.gpu.bandwidth * constant("memory_efficiency")
    return max(read / bandwidth, operations / _compute(work)) + latency


def prefill_seconds(work: Work, gpus: int) -> float:
    """The prompts of all samples, over `gpus` GPUs."""
    return 2 * work.active * work.lengths.samples * work.lengths.prompt / (_compute(work) * gpus)


def _compute(work: Work) -> float:
    return work.gpu.bf16 * constant("training_efficiency")


def generation_seconds(work: Work) -> float:
    """Prefill of all prompts, then decoding until an engine's longest response is done."""
    lengths = work.lengths
    each = lengths.samples / work.engines
    waves = max(1.0, each / max(1, work.running))
    together = each / waves
    steps, seconds = 200, 0.0
    width = lengths.longest_response / steps
    for i in range(steps):
        token = (i + 0.5) * width
        rows = together * lengths.alive(token)
        # Even a single response takes every decoding step.
        seconds += width * decode_seconds(work, rows, rows * (lengths.prompt + token))
    return prefill_seconds(work, work.gpus) + waves * seconds


def sync_seconds(plan: SyncPlan, gpu: Gpu) -> float:
    """All buckets, one after the other: gather, send, load."""
    efficiency = constant("link_efficiency")
    seconds = 0.0
    for size, (nvlink, network) in zip(plan.bucket_bytes, plan.slowest, strict=True):
        seconds += nvlink / (constant("nvlink") * efficiency) + network / (constant("network") * efficiency)
        # Two copies, into the shared buffer and into the engine's tensors, each a read and a write.
        seconds += 4 * size / (gpu.bandwidth * constant("memory_efficiency")) + constant("bucket_latency")
    return seconds


def host_step_seconds(optimizer_bytes: int) -> float:
    """Adam on a CPU over fp32 master weights and moments, 12 bytes per parameter: it receives an fp32
    gradient, then returns an fp32 weight; it reads four numbers and writes three."""
    parameters = optimizer_bytes / 12
    return parameters * (8 / constant("host_link") + 28 / constant("host_memory"))


def step_times(work: Work, sync: float, moved_bytes: int, host_optimizer: int = 0) -> Times:
    """The phases of one step.

    Args:
        sync: seconds of the weight sync.
        moved_bytes: bytes that a rank moves to host memory and back in each step.
        host_optimizer: bytes of a rank's optimizer that stay in host memory.
    """
    generation, training = generation_seconds(work), training_seconds(work)
    turns = 2 * moved_bytes / constant("host_link")
    host_step = host_step_seconds(host_optimizer)
    counted = generation + training + sync + turns + host_step
    step = counted * constant("step_overhead")
    tokens = work.lengths.tokens
    return Times(
        generation,
        sync,
        turns,
        host_step,
        training,
        step - counted,
        tokens / step / work.gpus,
        tokens / training / work.gpus,
    )
