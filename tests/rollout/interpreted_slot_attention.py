"""SGLang's attention backend of exact mode on GPUs, over a paged cache, against the call of a training pass.

Run by test_slot_attention.py, which sets TRITON_INTERPRET=1 and OPO_EXACT_TRITON=1: a CUDA graph is a list of
calls that runs again on the same tensors.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opo_megatron.kernels import exact
from tests.support import interpreter_bf16 as interpreter_bf16

HEADS, GROUPS, WIDTH, SLOTS, CONTEXT = 2, 1, 16, 150, 48
LENGTHS = (1, 34, 7, 39, 3)
"""Keys of each request."""


class Backend:
    """Stands for SGLang's base class, whose own part is to call these two."""

    def init_forward_metadata(self, forward_batch: Any) -> None:
        raise AssertionError("the backend has its own")


@dataclass
class WriteLoc:
    loc: Tensor


def stubbed() -> type:
    """The backend, over stand-ins for the two names of SGLang that it imports."""
    for name, members in {
        "sglang.srt.layers.attention.base_attn_backend": {"AttentionBackend": Backend},
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": WriteLoc},
    }.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        vars(sys.modules[name]).update(members)
    from opo_megatron.rollout.sglang.exact_server.slot_attention import SlotAttention

    return SlotAttention


SlotAttention = stubbed()
LAYER = SimpleNamespace(layer_id=0, tp_q_head_num=HEADS, head_dim=WIDTH, scaling=WIDTH**-0.5)


class Pool:
    """SGLang's cache of one layer."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = (SLOTS, GROUPS, WIDTH)
        self.keys, self.values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))

    def get_key_buffer(self, layer: int) -> Tensor:
        return self.keys

    def get_value_buffer(self, layer: int) -> Tensor:
        return self.values

    def set_kv_buffer(self, layer: Any, place: WriteLoc, k: Tensor, v: Tensor) -> None:
        self.keys[place.loc] = k.view(-1, GROUPS, WIDTH)
        self.values[place.loc] = v.view(-1, GROUPS, WIDTH)


STARTS = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]


@cache
def training_pass() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values of all requests, one after another, and the attention's output."""
    generator, count = torch.Generator().manual_seed(0), sum(LENGTHS)
    q, k, v = (
        torch.randn(count, heads, WIDTH, generator=generator).bfloat16() for heads in (HEADS, GROUPS, GROUPS)
    )
    table = (torch.arange(max(LENGTHS)) + torch.tensor(STARTS[:-1]).unsqueeze(1)).clamp(max=count - 1)
    ends = torch.tensor(STARTS).int(), torch.tensor(LENGTHS).int()
    output = exact.slot_attention(q, k, v, table.int(), *ends, max(LENGTHS), LAYER.scaling)
    return q, k, v, output.flatten(1)


class Server:
    """A backend, its cache with every request's keys in scattered slots, and the rows of a training pass."""

    def __init__(self) -> None:
        generator, self.starts = torch.Generator().manual_seed(2), STARTS
        self.q, self.k, self.v, self.expected = training_pass()
        slots = torch.randperm(SLOTS - 1, generator=generator) + 1  # 0 is SGLang's slot of padding
        requests = torch.zeros(len(LENGTHS) + 3, CONTEXT, dtype=torch.int32)
        self.rows = torch.randperm(len(LENGTHS) + 2, generator=generator)[: len(LENGTHS)] + 1
        self.slots = []
        for row, begin, length in zip(self.rows, self.starts, LENGTHS, strict=False):
            self.slots.append(slots[begin : begin + length])
            requests[row, :length] = self.slots[-1]
        self.pool = Pool()
        self.runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(req_to_token=requests),
            token_to_kv_pool=self.pool,
            decode_cuda_graph_runner="graphs",
        )
        self.backend = SlotAttention(self.runner)

    def batch(self, new: dict[int, int], ends: dict[int, int] | None = None) -> SimpleNamespace:
        """A forward pass over the last `new[i]` tokens of request i's first `ends[i]`, by default all."""
        ends = ends or {i: LENGTHS[i] for i in new}
        lengths = torch.tensor([ends[i] for i in new])
        spans = [(i, ends[i] - count, ends[i]) for i, count in new.items()]
        return SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: False),
            batch_size=len(new),
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            req_pool_indices=self.rows[list(new)],
            extend_seq_lens=torch.tensor(list(new.values()), dtype=torch.int32),
            extend_seq_lens_cpu=list(new.values()),
            out_cache_loc=torch.cat([self.slots[i][begin:end] for i, begin, end in spans]).long(),
            tokens=torch.cat([torch.arange(begin, end) + self.starts[i] for i, begin, end in spans]),
        )

    def decoding(self, requests: Sequence[int], ends: dict[int, int] | None = None) -> SimpleNamespace:
        batch = self.batch(dict.fromkeys(requests, 1), ends)
        batch.forward_mode = SimpleNamespace(is_decode=lambda: True)
        return batch

    def fill(self, requests: Sequence[int]) -> None:
        """Write all keys but those of the last token."""
        for i in requests:
            self.pool.keys[self.slots[i][:-1]] = self.k[self.starts[i] : self.starts[i + 1] - 1]
            self.pool.values[self.slots[i][:-1]] = self.v[self.starts[i] : self.starts[i + 1] - 1]

    def attend(self, batch: Any) -> Tensor:
        q, k, v = (part[batch.tokens].flatten(1) for part in (self.q, self.k, self.v))
        run = self.backend.forward_decode if batch.forward_mode.is_decode() else self.backend.forward_extend
        result: Tensor = run(q, k, v, LAYER, batch)
        return result

    def eager(self, batch: Any) -> Tensor:
        self.backend.init_forward_metadata(batch)
        return self.attend(batch)


@pytest.fixture
def server() -> Server:
    return Server()


def test_the_training_pass_is_the_usual_attention() -> None:
    q, k, v, output = training_pass()
    for begin, end in itertools.pairwise(STARTS):
        one = (part[begin:end].float().transpose(0, 1) for part in (q, k, v))
        usual = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True, scale=LAYER.scaling)
        torch.testing.assert_close(
            output[begin:end].float(), usual.transpose(0, 1).flatten(1), rtol=0.02, atol=0.02
        )


@pytest.mark.parametrize("first", [1, 7, 16, 32, 33])
def test_a_prompt_in_two_chunks_has_the_rows_of_training(server: Server, first: int) -> None:
    requests = [i for i, length in enumerate(LENGTHS) if length > first]
    for new, ends in (
        (dict.fromkeys(requests, first), dict.fromkeys(requests, first)),
        ({i: LENGTHS[i] - first for i in requests}, None),
    ):
        batch = server.batch(new, ends)
        assert torch.equal(server.eager(batch), server.expected[batch.tokens])


@pytest.mark.parametrize("requests", [(3,), (0, 4), (4, 0, 2), range(5), (2, 1, 3)], ids=str)
def test_prompts_of_different_lengths_at_once_have_the_rows_of_training(
    server: Server, requests: Sequence[int]
) -> None:
    batch = server.batch({i: LENGTHS[i] for i in requests})
    assert torch.equal(server.eager(batch), server.expected[batch.tokens])


@pytest.mark.parametrize("requests", [(3,), (0, 4), (4, 0, 2), range(5), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("has_mirror", [True, False], ids=["lengths on the host", "lengths on the GPU alone"])
def test_decoding_has_the_rows_of_training(server: Server, requests: Sequence[int], has_mirror: bool) -> None:
    server.fill(requests)
    batch = server.decoding(requests)
    if not has_mirror:
        batch.seq_lens_cpu = None
    assert torch.equal(server.eager(batch), server.expected[batch.tokens])


class Graph:
    """What SGLang's runner captures for one batch size, and replays: the same calls on the same tensors."""

    def __init__(self, server: Server, size: int) -> None:
        self.server, self.size = server, size
        fill = server.backend.get_cuda_graph_seq_len_fill_value()
        self.static = SimpleNamespace(
            forward_mode=SimpleNamespace(is_decode=lambda: True),
            batch_size=size,
            seq_lens=torch.full((size,), fill),
            seq_lens_cpu=torch.full((size,), fill),
            req_pool_indices=torch.zeros(size, dtype=torch.int64),
            out_cache_loc=torch.zeros(size, dtype=torch.int64),
            tokens=torch.zeros(size, dtype=torch.int64),
        )
        server.backend.init_forward_metadata_out_graph(self.static, in_capture=True)
        self.captured = server.backend.forward_metadata
        self._run()

    def _run(self) -> Tensor:
        self.server.backend.forward_metadata = self.captured
        self.server.backend.init_forward_metadata_in_graph(self.static)
        return self.server.attend(self.static)

    def replay(self, batch: SimpleNamespace) -> Tensor:
        count = batch.batch_size
        for name, padding in (
            ("seq_lens", 1), ("req_pool_indices", 0), ("out_cache_loc", 0), ("tokens", 0),
        ):  # fmt: skip
            getattr(self.static, name)[:count] = getattr(batch, name)
            getattr(self.static, name)[count:] = padding
        self.server.backend.init_forward_metadata_out_graph(self.static)
        return self._run()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_replayed_graph_has_the_rows_of_training_also_in_a_padded_batch(server: Server, size: int) -> None:
    server.backend.init_cuda_graph_state(5, 5)
    graphs = {count: Graph(server, count) for count in (5, size)}
    for requests in (range(max(1, size - 2)), range(size)):
        server.fill(requests)
        server.eager(server.batch({0: 1, 2: 7}))  # another forward pass in between
        batch = server.decoding(requests)
        rows = graphs[size].replay(batch)
        assert torch.equal(rows[: len(requests)], server.expected[batch.tokens])
        assert rows.isfinite().all()
    assert graphs[5].captured.table.data_ptr() == graphs[size].captured.table.data_ptr()


def test_the_host_reads_nothing_of_what_a_graph_holds(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def kernel(query: Tensor, *arguments: Any) -> Tensor:
        seen.append(arguments)
        return query

    server.backend.init_cuda_graph_state(5, 5)
    graph = Graph(server, 5)
    monkeypatch.setattr(exact, "slot_attention", kernel)
    batch = server.decoding(range(4))

    def read(self: Tensor, *_: Any) -> None:
        raise AssertionError("the host waits for the GPU")

    for name in ("item", "tolist", "cpu", "__bool__", "__int__", "numpy"):
        monkeypatch.setattr(Tensor, name, read)
    graph.replay(batch)
    monkeypatch.undo()
    ((_, _, table, starts, lengths, most, _),) = seen
    assert most == 1 and table is graph.captured.table and starts is graph.captured.query_starts
    assert lengths.tolist() == [*LENGTHS[:4], 1]


def test_requests_may_decode_without_graphs_and_the_next_in_them_again(server: Server) -> None:
    for wanted in (True, False, False, True, True, False, True):
        server.backend.use_graphs(wanted)
        assert server.runner.decode_cuda_graph_runner == ("graphs" if wanted else None)
    server.runner.decode_cuda_graph_runner = None
    for wanted in (False, True):  # of a server without any
        server.backend.use_graphs(wanted)
        assert server.runner.decode_cuda_graph_runner is None
