"""Exact mode in the policy: Megatron's layers computed with the operations of `kernels/exact.py`.

Every module with parameters is a subclass of Megatron's, so names, checkpoints, gradients and their
reduction stay the same; only the rounding of the forward pass changes.  Megatron's MLP is unchanged:
its SwiGLU splits gate and up from one tensor, as the local engine's decoder does.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from opo_megatron.kernels import exact
from opo_megatron.policy.packed_attention import PackedAttention


class ExactColumnLinear(ColumnParallelLinear):
    """The column-parallel projections: query, key and value; gate and up."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any
    ) -> Tensor:  # Megatron passes `input` by keyword
        product = exact.linear(input, weight)
        return product if bias is None else product + bias


class ExactRowLinear(RowParallelLinear):
    """The row-parallel projections: attention output; MLP down."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return exact.linear(input, weight)


class ExactAttention(PackedAttention):
    """Causal attention over padded rows, or over one row of packed sequences."""

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


def use_exact_layers(spec: Any) -> None:
    """Replace modules of a dense layer's local spec by the classes of this file, in place."""
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp
    attention.linear_qkv, attention.linear_proj = ExactColumnLinear, ExactRowLinear
    attention.core_attention = ExactAttention
    mlp.submodules.linear_fc1, mlp.submodules.linear_fc2 = ExactColumnLinear, ExactRowLinear
