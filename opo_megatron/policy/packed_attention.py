"""Attention of Megatron's local layers over packed sequences, which its own refuses.

Each sequence by itself runs through Megatron's local attention: same scale, grouped queries, softmax and
rounding as in a padded micro-batch.  Under context parallelism every rank gathers the keys and values of
the whole row, and its own queries attend to those that are not behind them.

It is for layers that are not Transformer Engine's, hence for a CPU; on GPUs Transformer Engine's attention
takes all sequences in one kernel, and keys and values go round in a ring.
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
        # Megatron's own refuses to be built where rows are cut; here it is given whole ones.
        whole = copy.copy(config)
        whole.context_parallel_size = 1
        super().__init__(whole, *args, **kwargs)
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
        """Packed: [T, heads, width] and twice [T, groups, width] → [T, 1, heads · width]; T / C places of
        each where C context-parallel ranks share the row."""
        attend = super().forward
        if packed_seq_params is None:
            return attend(query, key, value, attention_mask, *args, **kwargs)
        ends = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        masks: list[Tensor | None] = [attention_mask] * len(lengths)
        queries = lengths
        if self.context_size > 1:
            rank = parallel_state.get_context_parallel_rank()
            key, value = (_whole_row(tensor, lengths, self.context_size) for tensor in (key, value))
            queries = [length // self.context_size for length in lengths]
            masks = [_behind(length, rank, self.context_size).to(query.device) for length in lengths]
        parts = zip(
            query.unsqueeze(1).split(queries),
            key.unsqueeze(1).split(lengths),
            value.unsqueeze(1).split(lengths),
            masks,
            strict=True,
        )
        return torch.cat([attend(*part, *args, **kwargs) for part in parts])


def _whole_row(own: Tensor, lengths: list[int], size: int) -> Tensor:
    """[T / C, …] of each context-parallel rank → [T, …] in the row's order; gradients are summed back."""
    gathered = gather_from_sequence_parallel_region(own, group=parallel_state.get_context_parallel_group())
    places = torch.cat([context_positions(lengths, rank, size) for rank in range(size)])
    return gathered[places.argsort()]


def _behind(length: int, rank: int, size: int) -> Tensor:
    """[1, 1, length / C, length] of a sequence: which keys are behind each query of a rank, and so hidden."""
    positions = context_positions([length], rank, size)
    return (torch.arange(length) > positions.unsqueeze(1)).view(1, 1, -1, length)
