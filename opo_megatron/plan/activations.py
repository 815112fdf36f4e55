"""Activation memory: Megatron's own pipeline schedule on meta tensors, with every storage tracked.

    held(t) = bytes of all storages allocated since the start and not yet freed;  peak = max held(t)

Forward and backward, the micro-batches in flight on each stage, what the pipeline frees early, recomputation
and the LM head's buffer are executed, not modelled.  Where a GPU's kernel differs from Megatron's local
layers, the GPU's is counted: attention saves queries, keys, values, its output and one log-sum-exp per row,
and no score matrix (FlashAttention, arXiv 2205.14135); a norm saves its input and one number per row, where
torch's on a CPU saves fp32 copies; rotary embeddings of packed sequences save nothing, where Megatron's save
sine and cosine of every position; the head's logits have the weight's dtype (`kernels/lm_head.py`).

Left out: what kernels allocate and free before they return, such as the keys and values that circulate under
context parallelism, and the allocator's rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.batch.micro_batch import schedule_for
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.choices import Dtype, Packing, Recompute
from opo_megatron.config.schema import PolicyConfig
from opo_megatron.kernels import lm_head
from opo_megatron.plan.ranks import META, inner_optimizers
from opo_megatron.policy.policy import Policy


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations allocate within its context."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._tracked: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META and _key(tensor) not in inputs:
                self._track(tensor.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._tracked or not size:
            return
        self.held += size
        self.peak = max(self.peak, self.held)

        def freed(_: Any) -> None:
            self.held -= size
            del self._tracked[key]

        self._tracked[key] = weakref.ref(storage, freed)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activation_peak(policy: Policy, lengths: Sequence[tuple[int, int]], on_gpus: bool) -> int:
    """Peak bytes of a step's activations, in addition to what the policy always holds.

    Args:
        lengths: (prompt, response) tokens of each sample of the step, over all ranks.
        on_gpus: count attention and the head as GPUs compute them.
    """
    responses = torch.tensor([response for _, response in lengths])
    schedule = policy.schedule(torch.tensor([prompt + response for prompt, response in lengths]))
    own = schedule.samples_of(policy.parallel.dp_rank)
    rollouts = _rollouts([lengths[i] for i in own])
    objective = PolicyGradient(float(responses.sum()), 1.0)
    # All counted micro-batches have one shape, and sending shapes between stages needs values.
    policy.megatron_config.variable_seq_lengths = False
    # The reduction comes after the peak; torch has no coalesced collectives of meta tensors.
    policy.reduce_gradients = lambda _: None
    live = LiveBytes()
    kernels = _gpu_kernels(policy) if on_gpus else _own_kernels()
    with kernels, live:
        policy.accumulate_gradients(rollouts, schedule, objective)
    return live.peak


def optimizer_step_peak(policy: Policy) -> int:
    """Bytes that torch's Adam allocates temporarily in a step; fused kernels on GPUs allocate none."""
    live = LiveBytes()
    for optimizer in inner_optimizers(policy):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        with live:
            optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    return live.peak


def _rollouts(lengths: Sequence[tuple[int, int]]) -> Rollouts:
    rollouts = Rollouts.from_demonstrations([[0] * p for p, _ in lengths], [[0] * r for _, r in lengths])
    rollouts.is_demonstration = False
    rollouts.advantages = torch.zeros(len(lengths), dtype=torch.float64)
    return rollouts


@contextmanager
def _own_kernels() -> Iterator[None]:
    yield


@contextmanager
def _gpu_kernels(policy: Policy) -> Iterator[None]:
    """Replace layers by ones that save what a GPU's kernels save, within this context."""
    replaced = []
    for module in (module for chunk in policy.chunks for module in chunk.modules()):
        if isinstance(module, DotProductAttention):
            replaced.append((module, _attend))
        elif isinstance(module, torch.nn.RMSNorm):
            replaced.append((module, partial(_Norm.apply, module.weight)))
    for module, forward in replaced:
        module.forward = forward
    try:
        with ExitStack() as patches:
            patches.enter_context(
                mock.patch("opo_megatron.policy.lm_head.chunked_logprobs", _chunked_logprobs)
            )
            if policy.config.packing is Packing.thd:
                rotary = "megatron.core.transformer.attention.apply_rotary_pos_emb"
                patches.enter_context(mock.patch(rotary, _rotate))
            yield
    finally:
        for module, _ in replaced:
            del module.forward  # uncovers the class's forward


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Attention.apply(query, key, value).flatten(-2)


class _Attention(torch.autograd.Function):
    """The tensors of fused attention: q [s, b, heads, head_dim], k and v [s, b, groups, head_dim], or packed
    [T, …] each."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, log_sum)
        return result

    @staticmethod
    def backward(ctx: Any, *d_result: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _rotate(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Rotary.apply(tensor)


class _Rotary(torch.autograd.Function):
    """The tensors of a fused rotary embedding, whose gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    @staticmethod
    def backward(ctx: Any, *d_result: Tensor) -> Tensor:
        return torch.empty_like(d_result[0])


class _Norm(torch.autograd.Function):
    """The tensors of a fused RMSNorm."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(weight, hidden, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *d_result: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:2])


def _chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocabulary: lm_head.VocabularyShard,
    temperature: float,
    chunk_tokens: int,
    coefficient: Callable[[Tensor, slice], tuple[Tensor, Tensor]] | None = None,
    d_weight: Tensor | None = None,
    exact: bool = False,
) -> lm_head.HeadOutput:
    """The tensors of `kernels.lm_head.chunked_logprobs` by Triton."""
    n = hidden.shape[0]
    output = lm_head.HeadOutput(*(hidden.new_empty(n, dtype=torch.float32) for _ in range(3)))
    buffer = lm_head._aligned_buffer(min(n, chunk_tokens), weight)
    if coefficient is not None:
        output.loss = hidden.new_empty(n, dtype=torch.float32)
        output.d_hidden = torch.empty_like(hidden)
    del buffer
    return output


def recomputes_all(policy: PolicyConfig) -> bool:
    """Whether the backward pass recomputes all layers."""
    return policy.recompute is Recompute.full or policy.megatron.get("recompute_granularity") == "full"


def textbook_activations(
    policy: PolicyConfig, lengths: Sequence[tuple[int, int]], dp_size: int, pp_rank: int
) -> int:
    """Bytes of a stage's activations by formula, for comparison and as a first guess.

    Per token and layer, in elements: 4·hidden for two norms, 2·queries + 2·keys for attention, 4·ffn for
    SwiGLU (of each active expert, whose tokens are also dispatched and combined); after Korthikanti et al.,
    arXiv 2205.05198.  With full recomputation a layer saves its input.
    """
    model = policy.model
    assert model.num_query_groups is not None and model.kv_channels is not None
    hidden, head_dim = model.hidden_size, model.kv_channels
    elements = 4 * hidden + 2 * (model.num_attention_heads + model.num_query_groups) * head_dim
    if model.num_moe_experts is None:
        elements += 4 * model.ffn_hidden_size
    else:
        elements += model.moe_router_topk * (4 * (model.moe_ffn_hidden_size or 0) + 2 * hidden)
    shards = policy.tensor_model_parallel_size
    if recomputes_all(policy):
        elements, shards = hidden, shards if policy.sequence_parallel else 1
    shards *= policy.context_parallel_size
    totals = [sum(one) for one in lengths]
    schedule = schedule_for(policy, totals, dp_size)
    tokens = schedule.padded_tokens(totals)[0] // schedule.count
    stages = policy.pipeline_model_parallel_size
    chunks = policy.virtual_pipeline_model_parallel_size or 1
    in_flight = stages - pp_rank
    if chunks > 1:
        in_flight = 2 * (stages - pp_rank - 1) + (chunks - 1) * stages + 1
    in_flight = min(in_flight, schedule.count * chunks)
    layers = model.num_layers // (stages * chunks)
    itemsize = 2 if policy.dtype is Dtype.bf16 else 4
    return elements * itemsize * tokens // shards * layers * in_flight
