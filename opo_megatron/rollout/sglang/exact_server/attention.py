"""SGLang's attention backends of exact mode: `kernels/exact.py` over the paged cache.

On a GPU the kernel reads keys and values where they are, by the table of each request's slots
(`slot_attention.py`).  On a CPU they are copied from their slots.  Requests with equally many new tokens,
which all have while they decode, are one batch: masked keys have weight 0 and change no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from opo_megatron.kernels import exact
from opo_megatron.rollout.sglang.exact_server.slot_attention import SlotAttention

# On CPUs every backend of another name gets Triton kernels for the tables of the cache.
NAME = "torch_native"
# On GPUs `torch_native` turns CUDA graphs off.
GPU_NAME = "triton"
DUMMY_SLOT = 0
"""SGLang's slot of padding; its content is finite."""


@dataclass
class _Batch:
    """Requests with equally many new tokens."""

    rows: Tensor
    """[b, new]: the new tokens in the flat batch."""
    places: Tensor
    """[b · groups · t]: rows of the cache [slots · groups, head_dim] with the keys of each group; t is the
    longest request's length, padded."""
    shape: tuple[int, int, int]
    """(b, groups, t)."""
    mask: Tensor
    """[b, 1, new, t]: True where a key comes after its query or belongs to none."""


class ExactAttention(AttentionBackend):  # type: ignore[misc]
    """Prefill, extension of a cached prefix, and decoding, by the one function that training calls."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self._groups = self.token_to_kv_pool.get_key_buffer(0).shape[1]
        self._batches: list[_Batch] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Group the requests of a forward pass; once for all layers."""
        lengths = forward_batch.seq_lens.tolist()
        if forward_batch.forward_mode.is_decode():
            new = [1] * len(lengths)
        else:
            new = forward_batch.extend_seq_lens.tolist()
        first_rows = [0, *accumulate(new)]
        groups: dict[int, list[int]] = {}
        for request, count in enumerate(new):
            groups.setdefault(count, []).append(request)
        table = self.req_to_token_pool.req_to_token
        pool_rows = forward_batch.req_pool_indices.long()
        self._batches = []
        for count, requests in groups.items():
            total = torch.tensor([lengths[i] for i in requests]).unsqueeze(1)
            longest = int(total.max())
            keys = torch.arange(exact.padded_keys(longest))
            slots = torch.full((len(requests), keys.numel()), DUMMY_SLOT, dtype=torch.int64)
            slots[:, :longest] = table[pool_rows[requests], :longest]
            slots.masked_fill_(keys >= total, DUMMY_SLOT)
            places = slots.unsqueeze(1) * self._groups + torch.arange(self._groups).unsqueeze(1)
            positions = total - count + torch.arange(count)  # [b, new]
            self._batches.append(
                _Batch(
                    rows=torch.tensor([first_rows[i] for i in requests]).unsqueeze(1) + torch.arange(count),
                    places=places.flatten(),
                    shape=(len(requests), self._groups, keys.numel()),
                    mask=(keys > positions.unsqueeze(2)).unsqueeze(1),
                )
            )

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> Tensor:
        """[n, heads · head_dim] → the same."""
        pool = self.token_to_kv_pool
        if save_kv_cache:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
        buffers = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        caches = [buffer.view(-1, layer.head_dim) for buffer in buffers]
        query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        output = torch.empty_like(query)
        for batch in self._batches:
            # Copying whole rows is ten times faster than indexing [slots, groups] and transposing.
            keys, values = (cache.index_select(0, batch.places).unflatten(0, batch.shape) for cache in caches)
            output[batch.rows] = exact.attention(query[batch.rows], keys, values, batch.mask)
        return output.flatten(1)

    forward_extend = forward_decode = _attend

    def support_triton(self) -> bool:
        return False


def backend(runner: Any) -> AttentionBackend:
    """The backend for the device of the cache."""
    keys = runner.token_to_kv_pool.get_key_buffer(0)
    return SlotAttention(runner) if exact.uses_triton(keys) else ExactAttention(runner)


for _name in (NAME, GPU_NAME):
    register_attention_backend(_name)(backend)
