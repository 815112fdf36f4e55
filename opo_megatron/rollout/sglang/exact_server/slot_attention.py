"""SGLang's attention backend of exact mode on GPUs: the kernel of the training pass over the paged cache.

Beside the cache, a forward pass needs the table of slots, where each request's queries begin, and how many
keys it has.  A CUDA graph holds the copy of that table from SGLang's own: the graph's tensors stay where they
are, and a replay reads what SGLang has put into its static ones.  The host reads nothing from the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor

from opo_megatron.kernels import exact


@dataclass
class Requests:
    """The arguments of the kernel that are the same in all layers."""

    table: Tensor
    """[requests, width] int32: the slot of every key."""
    query_starts: Tensor
    """[requests + 1] int32."""
    key_lengths: Tensor
    """[requests] int32."""
    most_queries: int


class SlotAttention(AttentionBackend):  # type: ignore[misc]
    """Prefill, extension of a cached prefix, and decoding, by the kernel that training calls."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self._runner = runner
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.forward_metadata: Requests | None = None
        self._graphs: Requests | None = None
        self._graph_runner: Any = None

    # ------------------------------------------------------------------ without a graph

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Once for all layers."""
        lengths = forward_batch.seq_lens
        if forward_batch.forward_mode.is_decode():
            starts = torch.arange(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
            most = 1
        else:
            starts = F.pad(forward_batch.extend_seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
            most = max(forward_batch.extend_seq_lens_cpu)
        table = self.req_to_token_pool.req_to_token
        if forward_batch.seq_lens_cpu is not None:
            table = table[:, : int(forward_batch.seq_lens_cpu.max())]
        table = table.index_select(0, forward_batch.req_pool_indices)
        self.forward_metadata = Requests(table, starts, lengths.int(), most)

    # ------------------------------------------------------------------ CUDA graphs of decoding

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        table = self.req_to_token_pool.req_to_token
        self._graphs = Requests(
            table=torch.zeros(max_bs, table.shape[1], dtype=torch.int32, device=table.device),
            query_starts=torch.arange(max_bs + 1, dtype=torch.int32, device=table.device),
            key_lengths=torch.ones(max_bs, dtype=torch.int32, device=table.device),
            most_queries=1,
        )

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Before a capture: the tensors that all graphs share.  Before a replay there is nothing to do."""
        if in_capture:
            assert self._graphs is not None
            count = forward_batch.batch_size
            self.forward_metadata = Requests(
                self._graphs.table[:count],
                self._graphs.query_starts[: count + 1],
                self._graphs.key_lengths[:count],
                most_queries=1,
            )

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Recorded: copy the slots and lengths of the batch that is replayed."""
        requests = self.forward_metadata
        assert requests is not None
        table = self.req_to_token_pool.req_to_token
        torch.index_select(table, 0, forward_batch.req_pool_indices, out=requests.table)
        requests.key_lengths.copy_(forward_batch.seq_lens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Keys of a request that pads a batch: one, in SGLang's slot of padding."""
        return 1

    def use_graphs(self, wanted: bool) -> None:
        """Whether the requests of the forward passes from here on may decode in CUDA graphs.

        SGLang decodes without them where the runner has none.
        """
        if not wanted and self._runner.decode_cuda_graph_runner is not None:
            self._graph_runner = self._runner.decode_cuda_graph_runner
            self._runner.decode_cuda_graph_runner = None
        elif wanted and self._graph_runner is not None:
            self._runner.decode_cuda_graph_runner, self._graph_runner = self._graph_runner, None

    # ------------------------------------------------------------------ attention

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
        pool, requests = self.token_to_kv_pool, self.forward_metadata
        assert requests is not None
        if save_kv_cache:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc), k, v)
        mixed = exact.slot_attention(
            q.view(-1, layer.tp_q_head_num, layer.head_dim),
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            requests.table,
            requests.query_starts,
            requests.key_lengths,
            requests.most_queries,
            layer.scaling,
        )
        return mixed.flatten(1)

    forward_extend = forward_decode = _attend
