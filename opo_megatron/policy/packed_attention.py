"""Attention over packed sequences for Megatron's local layers, whose own does not support them.

Each sequence runs through Megatron's local attention by itself: same scale, grouped queries, softmax and
rounding as in a padded micro-batch.  Under context parallelism every rank all-gathers the keys and values of
the whole row, and its own queries attend to them causally.

It is for CPUs, where layers are not Transformer Engine's; on GPUs Transformer Engine's attention runs all
sequences in one kernel, with ring attention under context parallelism.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from opo_megatron.batch.packing import context_positions


class PackedAttention(DotProductAttention):
    """Causal attention over padded rows, or over one row of packed sequences."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        # Megatron's raises under context parallelism; here it gets keys and values of whole rows.
        config_without_cp = copy.copy(config)
        config_without_cp.context_parallel_size = 1
        super().__init__(config_without_cp, *args, **kwargs)
        self.context_size = config.context_parallel_size

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
        """Packed: query [T, heads, head_dim], key and value [T, groups, head_dim] → [T, 1, heads · head_dim];
        with C context-parallel ranks, T / C positions of each."""
        if packed_seq_params is None:
            return self.attend(query, key, value, attention_mask, *args, **kwargs)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        masks: list[Tensor | None] = [attention_mask] * len(lengths)
        queries = lengths
        if self.context_size > 1:
            rank = parallel_state.get_context_parallel_rank()
            key, value = (_gather_row(tensor, lengths, self.context_size) for tensor in (key, value))
            queries = [length // self.context_size for length in lengths]
            masks = [_causal_mask(length, rank, self.context_size).to(query.device) for length in lengths]
        parts = zip(
            query.unsqueeze(1).split(queries),
            key.unsqueeze(1).split(lengths),
            value.unsqueeze(1).split(lengths),
            masks,
            strict=True,
        )
        return torch.cat([self.attend(*part, *args, **kwargs) for part in parts])

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [s, b, heads, head_dim], key and value [t, b, groups, head_dim] → [s, b, heads · head_dim].

        Args:
            mask: True where a key is masked; None is causal, where s = t.
        """
        return super().forward(query, key, value, mask, *args, **kwargs)


def _gather_row(own: Tensor, lengths: list[int], size: int) -> Tensor:
    """[T / C, …] of each context-parallel rank → [T, …] in the row's order; backward is a reduce-scatter."""
    gathered = gather_from_sequence_parallel_region(own, group=parallel_state.get_context_parallel_group())
    positions = torch.cat([context_positions(lengths, rank, size) for rank in range(size)])
    return gathered[positions.argsort()]


def _causal_mask(length: int, rank: int, size: int) -> Tensor:
    """[1, 1, length / C, length]: True where a key comes after the query of this rank, and is masked."""
    positions = context_positions([length], rank, size)
    return (torch.arange(length) > positions.unsqueeze(1)).view(1, 1, -1, length)
