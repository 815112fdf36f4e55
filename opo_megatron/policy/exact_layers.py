"""Exact mode in the policy: Megatron's layers with the operations of `kernels/exact.py` inside.

Everything that has parameters stays Megatron's class, so names, checkpoints, gradients and their
reduction are as they were; what changes is how the forward pass rounds.  Megatron's MLP stays as it
is: its SwiGLU takes gate and up out of one tensor, as the decoder's does.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from opo_megatron.kernels import exact


class ExactColumnLinear(ColumnParallelLinear):
    """The projections into a layer: query, key and value; gate and up."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:  # named as Megatron calls it
        product = exact.linear(input, weight)
        return product if bias is None else product + bias


class ExactRowLinear(RowParallelLinear):
    """The projections out of a layer."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return exact.linear(input, weight)


class ExactAttention(DotProductAttention):
    """Causal attention over whole sequences."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[s, b, heads, width] and twice [s, b, groups, width] → [s, b, heads · width]."""
        mask = exact.causal_mask(query.shape[0], query.device)
        keys, values = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        mixed = exact.attention(query.transpose(0, 1), keys, values, mask)
        return mixed.transpose(0, 1).flatten(2)


def use_exact_layers(spec: Any) -> None:
    """Put the classes of this file into a dense layer's local spec, in place."""
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp
    attention.linear_qkv, attention.linear_proj = ExactColumnLinear, ExactRowLinear
    attention.core_attention = ExactAttention
    mlp.submodules.linear_fc1, mlp.submodules.linear_fc2 = ExactColumnLinear, ExactRowLinear
