"""The time of a step, phase by phase, from operations and bandwidths.

    training    (max( (3 + passes + recompute) · (2·N·tokens + attention) / (efficient peak · GPUs),
                reading the weights ) + exposed communication of tensor, context and pipeline ranks)
                · (1 + bubble) + gradients over replicas
    bubble      (PP − 1) / (micro-batches · virtual stages), Megatron's schedules
    dispatch    (3 + passes + recompute − 1) · 2·k·H·tokens·layers · (EP − 1)/EP / link, with experts
    decoding    Σ over positions t of max( (weights + cache read at t) / bandwidth, 2·N·alive(t) / peak )
                + latency
    host step   (gradients down, weights up) / host link + 28 bytes per parameter / host memory
    bookkeeping exchange with every other rank, rewards of a rank's tokens (records/all_else.json)
    sync        bytes of the slowest rank per bucket over each link, and the engine's two copies

One constant, fitted to one published run, multiplies the sum for what is not counted (imbalance, Python, slow
verifiers).  N counts the parameters that multiply a token: all matrices but the embedding, and only
the active experts; of a layer's E experts a decoding step of n responses reads 1 − (1 − k/E)ⁿ, as if tokens
chose them independently and uniformly.  Half of the policy's communication is assumed to hide behind
computation.  Evaluations and checkpoints are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from opo_megatron.config.schema import ModelConfig
from opo_megatron.plan.hardware import GPUS_PER_NODE, Gpu, constant
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.sizes import sizes_of
from opo_megatron.plan.sync import SyncPlan


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
    """Of the policy, as all that follow."""
    context_parallel: int = 1
    stages: int = 1
    """Of the pipeline, without virtual ones."""
    chunks: int = 1
    """Virtual stages of a pipeline rank."""
    policy_weights: int = 0
    """Bytes of a rank's weights, which every pass over a micro-batch reads."""
    micro_batches: int = 0
    """Per data-parallel rank."""
    replica_bytes: int = 0
    """What a rank exchanges with its data-parallel replicas: fp32 gradients there, parameters back."""

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
    bookkeeping: float
    """Rewards, exchange of samples and outcomes, digests, files."""
    other: float
    tokens_per_gpu: float
    """Tokens/s/GPU of the whole step, prompts and responses."""
    training_tokens_per_gpu: float
    """The same for training alone."""

    @property
    def step(self) -> float:
        counted = self.generation + self.sync + self.turns + self.host_step + self.training
        return counted + self.bookkeeping + self.other


def active_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that multiply a token."""
    sizes = sizes_of(model, vocab_size)
    total = sizes.matrices + (sizes.embedding if model.tie_embeddings else sizes.head)
    if model.num_moe_experts is not None:
        total += sizes.experts * model.moe_router_topk // model.num_moe_experts
    return total


def training_seconds(work: Work) -> float:
    """Forward, backward and additional passes, over all micro-batches."""
    model = work.model
    assert model.kv_channels is not None
    units = 3.0 + work.passes + (1.0 if work.recomputes else 0.0)
    sequence = work.lengths.prompt + work.lengths.response
    # Two products of scores over half a square, 2 operations each.
    attention = 2 * model.num_layers * model.num_attention_heads * model.kv_channels * sequence
    operations = units * work.trained_tokens * (2 * work.active + attention)
    peak = work.gpu.fp8 if work.trains_in_fp8 else work.gpu.bf16
    read = work.policy_weights * work.micro_batches * units
    seconds = max(
        operations / (peak * constant("training_efficiency") * work.gpus),
        read / (work.gpu.bandwidth * constant("memory_efficiency")),
    )
    seconds += dispatch_seconds(work) + communication_seconds(work)
    return seconds * (1 + work.bubble) + work.replica_bytes / (
        constant("network") * constant("link_efficiency")
    )


def communication_seconds(work: Work) -> float:
    """What tensor-, context- and pipeline-parallel ranks exchange during all passes, as far as it is exposed.

    Bytes that a rank receives per token of its own, per pass: two all-reduces a layer over TP ranks, 4 H each
    times 2 (t − 1)/t; keys and values of the other CP ranks, 4 groups·head_dim (c − 1); a hidden state per
    boundary between chunks, 2 H.  A rank has tokens · TP·PP / GPUs tokens of its own, and 1/PP of the layers.
    """
    model, tensor, context = work.model, work.tensor_parallel, work.context_parallel
    assert model.num_query_groups is not None and model.kv_channels is not None
    passes = 2.0 + work.passes + (1.0 if work.recomputes else 0.0)
    own = work.trained_tokens * tensor * work.stages / work.gpus
    layers = model.num_layers / work.stages
    reduced = layers * 2 * 2 * (tensor - 1) / tensor * 2 * model.hidden_size
    keys = layers * 2 * 2 * model.num_query_groups * model.kv_channels * (context - 1) / tensor
    hidden = 0 if work.stages == 1 else work.chunks * 2 * model.hidden_size / tensor
    within = constant("nvlink") if tensor * context <= GPUS_PER_NODE else constant("network")
    seconds = reduced / constant("nvlink") + keys / within + hidden / constant("network")
    return constant("exposed") * passes * own * seconds / constant("link_efficiency")


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
    latency = constant("decode_step")
    if work.engine_tp > 1:
        latency += 2 * work.model.num_layers * constant("decode_launch")
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


def bookkeeping_seconds(work: Work) -> float:
    """What all ranks tell each other, and the rewards of a rank's responses."""
    own = work.lengths.samples * work.lengths.response / work.gpus
    return (work.gpus - 1) * constant("exchange") + own * constant("reward")


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
    bookkeeping = bookkeeping_seconds(work)
    counted = generation + training + sync + turns + host_step + bookkeeping
    step = counted * constant("step_overhead")
    tokens = work.lengths.tokens
    return Times(
        generation,
        sync,
        turns,
        host_step,
        training,
        bookkeeping,
        step - counted,
        tokens / step / work.gpus,
        tokens / training / work.gpus,
    )
