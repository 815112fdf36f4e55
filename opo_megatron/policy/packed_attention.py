"""Attention of Megatron's local layers over packed sequences, which its own refuses.

Each sequence by itself runs through Megatron's local attention: same scale, grouped queries, softmax and
rounding as in a padded micro-batch.  It is for layers that are not Transformer Engine's, hence for a CPU; on
GPUs Transformer Engine's attention takes all sequences in one kernel.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class PackedAttention(DotProductAttention):
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
        """Packed: [T, heads, width] and twice [T, groups, width] → [T, 1, heads · width]."""
        attend = super().forward
        if packed_seq_params is None:
            return attend(query, key, value, attention_mask, *args, **kwargs)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        parts = zip(*(tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([attend(*part, attention_mask, *args, **kwargs) for part in parts])
