"""Memory of activations: Megatron's own schedule on meta tensors, with every storage followed.

    held(t) = bytes of all storages that were made since the start and not yet freed;  peak = max held(t)

A micro-batch's forward and backward, which micro-batches are in flight on which stage, what the pipeline
frees early, recomputation, the head's room: none of it is a formula here, all of it happens.  Some parts
have another kernel on a GPU than in Megatron's local layers, and are taken as they are there: attention
keeps queries, keys, values, its result and one log-sum-exp per row, and no matrix of scores
(FlashAttention, arXiv 2205.14135); a norm keeps its input and one number per row, where torch's own on a
CPU keeps copies in fp32; rotary embeddings of packed sequences keep nothing, where Megatron's own keep
sines and cosines of every place; the head's logits are in the weight's type (`kernels/lm_head.py`).

Left out: what kernels allocate inside and free before they return, such as the keys and values that come
round under context parallelism, and the allocator's rounding.
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
from opo_megatron.distributed.process_groups import Parallel
from opo_megatron.kernels import lm_head
from opo_megatron.plan.ranks import META, inner_optimizers
from opo_megatron.policy.policy import Policy


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make within its context."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META and _key(tensor) not in given:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self.held += size
        self.peak = max(self.peak, self.held)

        def freed(_: Any) -> None:
            self.held -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def activation_peak(policy: Policy, lengths: Sequence[tuple[int, int]], on_gpus: bool) -> int:
    """Bytes of a step's activations where they are most, over what the policy holds anyway.

    Args:
        lengths: (prompt, response) tokens of each sample of the step, over all ranks.
        on_gpus: count attention and the head as GPUs compute them.
    """
    responses = torch.tensor([response for _, response in lengths])
    plan = policy.schedule(torch.tensor([prompt + response for prompt, response in lengths]))
    own = plan.samples_of(policy.parallel.dp_rank)
    batch = _rollouts([lengths[i] for i in own])
    objective = PolicyGradient(float(responses.sum()), 1.0)
    # All micro-batches that are counted have one shape, and announcing shapes takes values.
    policy.megatron_config.variable_seq_lengths = False
    # The reduction comes after the peak; torch has no coalesced collectives of meta tensors.
    policy.megatron_config.finalize_model_grads_func = lambda *_, **__: None
    live = LiveBytes()
    kernels = _as_on_gpus(policy) if on_gpus else _as_it_is()
    with kernels, live:
        policy.accumulate_gradients(batch, plan, objective)
    return live.peak


def optimizer_step_peak(policy: Policy) -> int:
    """Bytes that torch's Adam takes beside its state while it steps; fused kernels on GPUs take none."""
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
    batch = Rollouts.from_demonstrations([[0] * p for p, _ in lengths], [[0] * r for _, r in lengths])
    batch.is_demonstration = False
    batch.advantages = torch.zeros(len(lengths), dtype=torch.float64)
    return batch


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _as_on_gpus(policy: Policy) -> Iterator[None]:
    """The kernels that a GPU has, for as long as this lasts."""
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
            del module.forward  # that of its class shows again


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Attention.apply(query, key, value).flatten(-2)


class _Attention(torch.autograd.Function):
    """The tensors of fused attention: q [s, b, heads, width], k and v [s, b, groups, width], or packed [T, …]
    each."""

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
    """The tensors of a fused rotary embedding, whose gradient is a turn back."""

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
    """Whether the backward pass runs all layers forward again."""
    return policy.recompute is Recompute.full or policy.megatron.get("recompute_granularity") == "full"


def textbook_activations(policy: PolicyConfig, lengths: Sequence[tuple[int, int]], parallel: Parallel) -> int:
    """The same by formula, to compare with: bytes of the layers' activations of a stage.

    Per token and layer, in elements: 4·hidden for two norms, 2·queries + 2·keys for attention, 4·ffn for
    SwiGLU (of each active expert, whose tokens are also copied out and back); after Korthikanti et al.,
    arXiv 2205.05198.  With full recomputation a layer keeps its input.
    """
    model = policy.model
    assert model.num_query_groups is not None and model.kv_channels is not None
    hidden, width = model.hidden_size, model.kv_channels
    elements = 4 * hidden + 2 * (model.num_attention_heads + model.num_query_groups) * width
    if model.num_moe_experts is None:
        elements += 4 * model.ffn_hidden_size
    else:
        elements += model.moe_router_topk * (4 * (model.moe_ffn_hidden_size or 0) + 2 * hidden)
    shared = policy.tensor_model_parallel_size
    if recomputes_all(policy):
        elements, shared = hidden, shared if policy.sequence_parallel else 1
    shared *= policy.context_parallel_size
    totals = [sum(one) for one in lengths]
    plan = schedule_for(policy, totals, parallel.dp_size)
    tokens = plan.padded_tokens(totals)[0] // plan.count
    stages, chunks = parallel.pp_size, parallel.vpp_size
    in_flight = stages - parallel.pp_rank
    if chunks > 1:
        in_flight = 2 * (stages - parallel.pp_rank - 1) + (chunks - 1) * stages + 1
    in_flight = min(in_flight, plan.count * chunks)
    layers = model.num_layers // (stages * chunks)
    itemsize = 2 if policy.dtype is Dtype.bf16 else 4
    return elements * itemsize * tokens // shared * layers * in_flight
