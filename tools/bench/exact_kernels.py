"""Exact mode's Triton kernels beside the libraries that the usual mode takes, on a GPU.

A case is a pair of calls that compute the same: ours, and that of cuBLAS (torch.matmul), Transformer Engine
(attention of training) or PyTorch (the rest).  Times are medians by CUDA events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench.gpu_kernels import milliseconds
from torch import Tensor

from opo_megatron.kernels import exact, exact_sampling

Call = Callable[[], Any]
Pair = tuple[Call, Call]
"""Ours and theirs."""


@dataclass(frozen=True)
class Shape:
    """Of a model, and of what it computes at once."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    training: tuple[int, int] = (32, 512)
    """Sequences × tokens of a micro-batch."""
    decoding: tuple[tuple[int, int], ...] = ((1, 512), (8, 8192), (64, 2048), (256, 512))
    """Requests × keys of each."""
    repeats: int = 20


SHAPES = {
    "1.35 G parameters": Shape(2048, 8192, 16, 4, 128, 32768),
    "Qwen3-0.6B's shape": Shape(1024, 3072, 16, 8, 128, 151936),
}


def kernel_times(shape: Shape) -> dict[str, dict[str, float]]:
    """Microseconds of each case on this GPU: ours, theirs, and ours / theirs."""
    table = {}
    for name, make in cases(shape, torch.device("cuda"), transformer_engine_attention).items():
        ours, theirs = (1e3 * milliseconds(call, shape.repeats) for call in make())
        table[name] = {"microseconds": ours, "of the library": theirs, "ours / library": ours / theirs}
    return table


def cases(
    shape: Shape,
    device: torch.device,
    attention: Callable[[Shape], Callable[[Tensor, Tensor, Tensor], Tensor]],
) -> dict[str, Callable[[], Pair]]:
    """Name → a function that makes the tensors of a case, so that only one case's are in memory.

    Args:
        attention: makes the library's causal attention of [b, s, heads, d].
    """
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    weights = {
        "queries, keys and values": (queries + 2 * keys, shape.hidden),
        "attention output": (shape.hidden, queries),
        "gate and up": (2 * shape.ffn, shape.hidden),
        "MLP output": (shape.hidden, shape.ffn),
    }
    tokens = shape.training[0] * shape.training[1]
    counts = (*(requests for requests, _ in shape.decoding), tokens)
    found: dict[str, Callable[[], Pair]] = {}
    for name, size in weights.items():
        for count in counts:
            found[f"product, {name}, {count} rows"] = _product(count, size, device)
    for requests, _ in shape.decoding:
        found[f"LM head, {requests} rows"] = _head(requests, shape, device)
        found[f"log-softmax, {requests} rows"] = _log_softmax(requests, shape, device)
        found[f"sampling, {requests} rows"] = _sampling(requests, shape, device)
    found["RMSNorm, training"] = _norm(tokens, shape, device)
    found["SwiGLU, training"] = _swiglu(tokens, shape, device)
    found["rotary embedding, training"] = _rotary(tokens, shape, device)
    found["attention, training"] = _training(shape, device, attention, with_gradient=False)
    found["attention and its gradient, training"] = _training(shape, device, attention, with_gradient=True)
    for requests, length in shape.decoding:
        found[f"attention, decoding {requests} × {length} keys"] = _decoding(requests, length, shape, device)
    return found


def _random(*size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(size, generator=generator, device=device).to(dtype)


def _product(rows: int, size: tuple[int, int], device: torch.device) -> Callable[[], Pair]:
    def make() -> Pair:
        x, weight = _random(rows, size[1], device=device), _random(*size, device=device)
        return without_gradient(lambda: exact.linear(x, weight)), lambda: torch.matmul(x, weight.t())

    return make


def _head(rows: int, shape: Shape, device: torch.device) -> Callable[[], Pair]:
    def make() -> Pair:
        hidden, weight = (_random(count, shape.hidden, device=device) for count in (rows, shape.vocabulary))
        return lambda: exact.logits(hidden, weight), lambda: torch.matmul(hidden, weight.t()).float()

    return make


def _log_softmax(rows: int, shape: Shape, device: torch.device) -> Callable[[], Pair]:
    def make() -> Pair:
        logits = _random(rows, shape.vocabulary, device=device, dtype=torch.float32)
        return lambda: exact.log_softmax(logits, 0.7), lambda: torch.log_softmax(logits / 0.7, -1)

    return make


def _sampling(rows: int, shape: Shape, device: torch.device) -> Callable[[], Pair]:
    def make() -> Pair:
        log_probs = _random(rows, shape.vocabulary, device=device, dtype=torch.float32).log_softmax(-1)
        uniform = torch.rand(rows, dtype=torch.float64, device=device)

        def ours() -> Tensor:
            return exact_sampling.inverse_cdf(exact_sampling.probabilities(log_probs), uniform)

        def theirs() -> Tensor:
            cumulative = log_probs.exp().double().cumsum(-1)
            return torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)[:, 0]

        return ours, theirs

    return make


def _norm(rows: int, shape: Shape, device: torch.device) -> Callable[[], Pair]:
    def make() -> Pair:
        x, weight = _random(rows, shape.hidden, device=device), _random(shape.hidden, device=device)
        return (
            without_gradient(lambda: exact.rms_norm(x, weight, 1e-6)),
            lambda: F.rms_norm(x, (shape.hidden,), weight, 1e-6),
        )

    return make


def _swiglu(rows: int, shape: Shape, device: torch.device) -> Callable[[], Pair]:
    def make() -> Pair:
        gate_up = _random(rows, 2 * shape.ffn, device=device)

        def theirs() -> Tensor:
            gate, up = gate_up.chunk(2, -1)
            return F.silu(gate) * up

        return without_gradient(lambda: exact.swiglu(gate_up)), theirs

    return make


def _rotary(rows: int, shape: Shape, device: torch.device) -> Callable[[], Pair]:
    def make() -> Pair:
        x = _random(rows, shape.heads, shape.head_dim, device=device)
        angles = _random(rows, 1, shape.head_dim // 2, device=device, dtype=torch.float32)
        cos, sin = (torch.cat((part, part), -1).bfloat16() for part in (angles.cos(), angles.sin()))

        def theirs() -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        return without_gradient(lambda: exact.rotary(x, cos, sin)), theirs

    return make


def _training(
    shape: Shape,
    device: torch.device,
    attention: Callable[[Shape], Callable[[Tensor, Tensor, Tensor], Tensor]],
    with_gradient: bool,
) -> Callable[[], Pair]:
    def make() -> Pair:
        sequences, length = shape.training
        q, k, v = (
            _random(sequences, length, heads, shape.head_dim, device=device).requires_grad_(with_gradient)
            for heads in (shape.heads, shape.groups, shape.groups)
        )
        table = torch.arange(sequences * length, dtype=torch.int32, device=device).view(sequences, length)
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device) * length
        lengths = torch.full((sequences,), length, dtype=torch.int32, device=device)
        library, scale = attention(shape), shape.head_dim**-0.5

        def ours() -> Tensor:
            query, keys, values = (part.flatten(0, 1) for part in (q, k, v))
            return exact.slot_attention(query, keys, values, table, starts, lengths, length, scale)

        def theirs() -> Tensor:
            return library(q, k, v)

        if not with_gradient:
            return without_gradient(ours), without_gradient(theirs)
        return (
            lambda: torch.autograd.grad(ours().float().sum(), (q, k, v)),
            lambda: torch.autograd.grad(theirs().float().sum(), (q, k, v)),
        )

    return make


def _decoding(requests: int, length: int, shape: Shape, device: torch.device) -> Callable[[], Pair]:
    """One token of each request over scattered slots; the library's keys lie together."""

    def make() -> Pair:
        q = _random(requests, shape.heads, shape.head_dim, device=device)
        keys, values = (
            _random(requests * length, shape.groups, shape.head_dim, device=device) for _ in range(2)
        )
        slots = torch.randperm(requests * length, device=device)
        table = slots.int().view(requests, length)
        starts = torch.arange(requests + 1, dtype=torch.int32, device=device)
        lengths = torch.full((requests,), length, dtype=torch.int32, device=device)
        k, v = (part[slots].unflatten(0, (requests, length)).transpose(1, 2) for part in (keys, values))
        scale = shape.head_dim**-0.5

        def theirs() -> Tensor:
            mixed = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, scale=scale, enable_gqa=True)
            return mixed[:, :, 0]

        return (
            without_gradient(lambda: exact.slot_attention(q, keys, values, table, starts, lengths, 1, scale)),
            theirs,
        )

    return make


def without_gradient(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def transformer_engine_attention(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causal attention of [b, s, heads, d] → the same."""
    from transformer_engine.pytorch import DotProductAttention

    module = DotProductAttention(
        shape.heads,
        shape.head_dim,
        num_gqa_groups=shape.groups,
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="causal",
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v).view_as(q)  # type: ignore[no-any-return]

    return attend
