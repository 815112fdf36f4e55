"""Exact mode in the policy: Megatron's layers computed with the operations of `kernels/exact.py`.

Every module with parameters is a subclass of Megatron's, so names, checkpoints, gradients and their
reduction stay the same; only the rounding of the forward pass changes.  On GPUs the rotary embedding and
attention take all sequences of a micro-batch in one launch, by the tables of `exact_rows.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from opo_megatron.distributed.megatron_versions import mlp_of_class, mlp_submodules
from opo_megatron.kernels import exact
from opo_megatron.policy.exact_rows import AttendedRows, packed_rows, padded_rows
from opo_megatron.policy.packed_attention import PackedAttention


class ExactColumnLinear(ColumnParallelLinear):
    """The column-parallel projections: query, key and value; gate and up."""

    def _forward_impl(
        self,
        input: Tensor,  # Megatron passes it by keyword
        weight: Tensor,
        bias: Tensor | None = None,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        **_: Any,
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        product = exact.linear(input, weight)
        return product if bias is None else product + bias


class ExactRowLinear(RowParallelLinear):
    """The row-parallel projections: attention output; MLP down.

    Their sums are split over ranks.  Every rank computes its share of the parts of `policy.exact_sum_parts`;
    all parts are gathered and added in order.
    """

    def __init__(self, *args: Any, parts: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_parts = parts // dist.get_world_size(self.tp_group)

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """[s, b, K / ranks] → [s, b, N], or this rank's part of s under sequence parallelism."""
        product = _RowProduct.apply(
            input_, self.weight, self.own_parts, self.tp_group, self.sequence_parallel
        )
        return product, None


class _RowProduct(torch.autograd.Function):
    """The product over all ranks with the usual gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, parts: int, group: Any, sequence_parallel: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        partials = exact.partial_products(x.flatten(0, 1), weight, parts)
        total = exact.add_in_order(_gathered(partials, group))
        product = total.to(x.dtype).unflatten(0, x.shape[:2])
        if sequence_parallel:
            product = product.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        if ctx.sequence_parallel:
            gradient = _gathered(gradient, ctx.group)
        rows = gradient.flatten(0, 1)
        return (rows @ weight).view_as(x), rows.t() @ x.flatten(0, 1), None, None, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, concatenated."""
    size = dist.get_world_size(group)
    if size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


class ExactMLP(MLP):
    """Gate and up, SwiGLU, down."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        gate_up, _bias = self.linear_fc1(hidden_states)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(exact.swiglu(gate_up))
        return output


class ExactSelfAttention(SelfAttention):
    """Megatron's, with the rotary embedding of exact mode on GPUs; on a CPU Megatron's has the same bits."""

    def forward(
        self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        self._packed = packed_seq_params
        output: tuple[Tensor, Tensor | None] = super().forward(
            *args, packed_seq_params=packed_seq_params, **kwargs
        )
        return output

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Megatron calls it before it rotates, and rotates nothing where this returns no frequencies.

        Args:
            query, key: [s, b, heads or groups, head_dim].
            rotary_pos_emb: angles [s, 1, 1, head_dim] of queries and of keys, which are the same.
        """
        if rotary_pos_emb is not None and exact.uses_triton(query):
            angles = rotary_pos_emb[0][:, 0]  # [s, 1, head_dim]
            if self._packed is not None:
                angles = angles[packed_rows(self._packed, query.shape[0]).positions]
            cos, sin = (
                part.to(query.dtype).unsqueeze(1).expand(-1, query.shape[1], -1, -1)
                for part in (angles.cos(), angles.sin())
            )
            query, key = exact.rotary(query, cos, sin), exact.rotary(key, cos, sin)
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )


class ExactAttention(PackedAttention):
    """Causal attention over padded rows, or over one row of packed sequences."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not exact.uses_triton(query):
            return super().forward(
                query, key, value, attention_mask, *args, packed_seq_params=packed_seq_params, **kwargs
            )
        if packed_seq_params is not None:
            rows = packed_rows(packed_seq_params, query.shape[0])
            if self.context_size > 1:
                group = parallel_state.get_context_parallel_group()
                key, value = (
                    gather_from_sequence_parallel_region(part, group=group) for part in (key, value)
                )
            return _attend(query, key, value, rows).flatten(1).unsqueeze(1)
        length, count = query.shape[:2]
        query, key, value = (part.transpose(0, 1).flatten(0, 1) for part in (query, key, value))
        mixed = _attend(query, key, value, padded_rows(count, length, query.device))
        return mixed.view(count, length, -1).transpose(0, 1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *_: Any, **__: Any
    ) -> Tensor:
        """query [s, b, heads, head_dim], key, value [t, b, groups, head_dim] → [s, b, heads · head_dim].

        Args:
            mask: [1, 1, s, t], where this rank's queries are a part of the sequence; otherwise causal.
        """
        if self.context_size == 1 or mask is None:
            mask = exact.causal_mask(query.shape[0], query.device)
        else:
            mask = F.pad(mask, (0, exact.padded_keys(mask.shape[-1]) - mask.shape[-1]), value=True)
        keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        mixed = exact.attention(query.transpose(0, 1), keys, values, mask)
        return mixed.transpose(0, 1).flatten(2)


def _attend(query: Tensor, key: Tensor, value: Tensor, rows: AttendedRows) -> Tensor:
    """[n, heads, head_dim] → the same, by the Triton kernel."""
    return exact.slot_attention(
        query,
        key.contiguous(),
        value.contiguous(),
        rows.table,
        rows.query_starts,
        rows.key_lengths,
        rows.most_queries,
        1 / math.sqrt(query.shape[-1]),
        rows.attended_positions,
    )


def use_exact_layers(spec: Any, parts: int) -> None:
    """Replace modules of a dense layer's local spec by the classes of this file, in place.

    Args:
        parts: `policy.exact_sum_parts`.
    """
    spec.submodules.self_attention.module = ExactSelfAttention
    attention, mlp = spec.submodules.self_attention.submodules, mlp_submodules(spec.submodules.mlp)
    row_linear = ModuleSpec(module=ExactRowLinear, params={"parts": parts})
    attention.linear_qkv, attention.linear_proj = ExactColumnLinear, row_linear
    attention.core_attention = ExactAttention
    mlp.linear_fc1, mlp.linear_fc2 = ExactColumnLinear, row_linear
    spec.submodules.mlp = mlp_of_class(ExactMLP, mlp)
