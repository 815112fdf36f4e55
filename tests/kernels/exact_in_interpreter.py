"""Exact mode's Triton operations in Triton's interpreter.

Run by test_exact_kernels.py, which sets TRITON_INTERPRET=1 and OPO_EXACT_TRITON=1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opo_megatron.batch.packing import context_positions
from opo_megatron.kernels import exact, exact_sampling
from opo_megatron.kernels import triton_exact_attention as kernel_file
from opo_megatron.kernels import triton_exact_linear as linear_file
from opo_megatron.kernels import triton_exact_rows as rows_file
from opo_megatron.policy.exact_rows import rows_of

NEAR = 2e-6
HEADS, GROUPS, HEAD_DIM = 2, 1, 16
SCALE = HEAD_DIM**-0.5
LENGTH = 131


@pytest.fixture(autouse=True)
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_file, "SPLIT", 64)
    monkeypatch.setattr(rows_file, "VOCABULARY_BLOCK", 64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def parts(
    length: int = LENGTH, seed: int = 1, heads: int = HEADS, groups: int = GROUPS, d: int = HEAD_DIM
) -> Any:
    """query, keys and values of one sequence."""
    return tuple(normal(length, count, d, seed=seed + i) for i, count in enumerate((heads, groups, groups)))


def packed(lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, int]:
    """table, starts, key lengths and most queries of a packed row."""
    ends = ints([0, *accumulate(lengths)])
    rows = rows_of(ends, max(lengths), sum(lengths), 0, 1)
    return rows.table, rows.query_starts, rows.key_lengths, rows.most_queries


def train(query: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], **options: Any) -> Tensor:
    return kernel_file.attention(query, keys, values, *packed(lengths), SCALE, **options)


def in_float64(query: Tensor, keys: Tensor, values: Tensor, scale: float = SCALE) -> Tensor:
    """Causal attention of one sequence."""
    shared = query.shape[1] // keys.shape[1]
    query, keys, values = query.double(), *(x.double().repeat_interleave(shared, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query, keys) * scale
    first = keys.shape[0] - query.shape[0]
    scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(first + 1), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def scattered(keys: Tensor, values: Tensor, lengths: Sequence[int], seed: int = 9) -> tuple[Tensor, ...]:
    """Pools of NaN that hold the first tokens of the sequence for each request in random slots; the table."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(sum(lengths) + 50, generator=generator).int()
    pools = tuple(torch.full((slots.numel(), *x.shape[1:]), math.nan) for x in (keys, values))
    table = torch.full((len(lengths), max(lengths) + 30), 2**30, dtype=torch.int32)  # never to be read
    start = 0
    for request, length in enumerate(lengths):
        own = slots[start : start + length]
        table[request, :length] = own
        for pool, x in zip(pools, (keys, values), strict=True):
            pool[own.long()] = x[:length]
        start += length
    return *pools, table


@pytest.fixture(scope="module")
def trained() -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    one = parts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_file, "SPLIT", 64)
        return one, train(*one, [LENGTH])


@pytest.mark.parametrize(
    ("heads", "groups", "d"), [(4, 4, 16), (4, 2, 16), (3, 1, 8), (6, 2, 24), (32, 1, 16)]
)
def test_attention_is_near_float64_for_every_grouping_of_heads(heads: int, groups: int, d: int) -> None:
    query, keys, values = parts(40, 3, heads, groups, d)
    query = query[-9:]
    result = kernel_file.attention(
        query, keys, values, torch.arange(40).int()[None], ints([0, 9]), ints([40]), 9, d**-0.5
    )
    assert (result - in_float64(query, keys, values, d**-0.5)).abs().max() < NEAR


@pytest.mark.parametrize("cached", [1, 7, 64, 100])
def test_extend_has_the_bits_of_training(trained: Any, cached: int) -> None:
    (query, keys, values), expected = trained
    pool_keys, pool_values, table = scattered(keys, values, [LENGTH])
    new = LENGTH - cached
    result = kernel_file.attention(
        query[cached:], pool_keys, pool_values, table, ints([0, new]), ints([LENGTH]), new, SCALE
    )
    assert torch.equal(result, expected[cached:])


@pytest.mark.parametrize("is_split", [False, True, None])
def test_scattered_decode_has_the_bits_of_training(trained: Any, is_split: bool | None) -> None:
    (query, keys, values), expected = trained
    lengths = [1, 2, 32, 33, 64, 65, 128, 131]
    pool_keys, pool_values, table = scattered(keys, values, lengths)
    last = torch.tensor(lengths) - 1
    result = kernel_file.attention(
        query[last], pool_keys, pool_values, table, ints(range(9)), ints(lengths), 1, SCALE, is_split=is_split
    )
    assert torch.equal(result, expected[last])


@pytest.mark.parametrize("neighbours", [[1], [5, 21], [64], [0, 3], [16, 16]])
def test_a_packed_sequence_has_the_same_bits_beside_any_others(trained: Any, neighbours: list[int]) -> None:
    one, expected = trained
    before = sum(neighbours)
    packed_parts = (torch.cat((normal(before, *x.shape[1:], seed=20), x[:70])) for x in one)
    result = train(*packed_parts, [*neighbours, 70])
    assert torch.equal(result[before:], expected[:70])


@pytest.mark.parametrize("size", [2, 3, 4])
def test_context_parallel_ranks_have_the_bits_of_one_rank(size: int) -> None:
    lengths = [48, 24]
    ends, total = ints([0, *accumulate(lengths)]), sum(lengths)
    query, keys, values = parts(total, 5)
    expected = train(query, keys, values, lengths)
    order = [context_positions(lengths, rank, size) for rank in range(size)]
    gathered = (x[torch.cat(order)] for x in (keys, values))
    keys, values = gathered
    for rank, own in enumerate(order):
        rows = rows_of(ends, max(lengths), total // size, rank, size)
        result = exact.slot_attention(
            query[own], keys, values, rows.table, rows.query_starts, rows.key_lengths, rows.most_queries,
            SCALE, rows.attended_positions,
        )  # fmt: skip
        assert torch.equal(result, expected[own])


def test_a_block_order_that_depends_on_the_length_has_other_bits(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control of the tests above: splits that are no absolute positions: a third more keys
    for this length."""
    (query, keys, values), expected = trained
    pool_keys, pool_values, table = scattered(keys, values, [LENGTH])
    monkeypatch.setattr(kernel_file, "SPLIT", 96)
    result = kernel_file.attention(
        query[-1:], pool_keys, pool_values, table, ints([0, 1]), ints([LENGTH]), 1, SCALE
    )
    assert not torch.equal(result, expected[-1:])
    torch.testing.assert_close(result, expected[-1:])


@pytest.mark.parametrize("size", [1, 2])
def test_the_gradient_of_attention_is_near_float64(size: int) -> None:
    lengths = [36, 8, 20]
    ends, total = ints([0, *accumulate(lengths)]), sum(lengths)
    inputs, d_output = parts(total, 7), normal(total, HEADS, HEAD_DIM, seed=8)
    doubles = [x.double().requires_grad_() for x in inputs]
    sequences = zip(*(x.split(lengths) for x in doubles), strict=True)
    torch.cat([in_float64(*one) for one in sequences]).backward(d_output.double())
    order = [context_positions(lengths, rank, size) for rank in range(size)]
    query, keys, values = inputs
    keys, values = (x[torch.cat(order)].requires_grad_() for x in (keys, values))
    for rank, own in enumerate(order):
        rows = rows_of(ends, max(lengths), total // size, rank, size)
        leaf = query[own].requires_grad_()
        exact.slot_attention(
            leaf, keys, values, rows.table, rows.query_starts, rows.key_lengths, rows.most_queries,
            SCALE, rows.attended_positions,
        ).backward(d_output[own])  # fmt: skip
        assert (leaf.grad - doubles[0].grad[own]).abs().max() < 2 * NEAR
    for x, expected in zip((keys, values), doubles[1:], strict=True):
        assert (x.grad - expected.grad[torch.cat(order)]).abs().max() < 2 * NEAR


ROWS = {
    "linear": lambda x: exact.linear(x, normal(70, x.shape[1], seed=11) / 8),
    "linear in parts": lambda x: exact.linear(x, normal(70, x.shape[1], seed=11) / 8, 2),
    "logits": lambda x: exact.logits(x, normal(70, x.shape[1], seed=11) / 8),
    "norm": lambda x: exact.rms_norm(x, normal(x.shape[1], seed=12), 1e-5),
    "SwiGLU": exact.swiglu,
    "log-softmax": lambda x: exact.log_softmax(x, 0.7),
    "rotary": lambda x: exact.rotary(x.view(-1, 6, 26), *(x[:, None, :26] for _ in "cs")),
}
IN_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x @ (normal(70, x.shape[1], seed=11) / 8).to(x).t(),
    "norm": lambda x: F.rms_norm(x, x.shape[1:], normal(x.shape[1], seed=12).to(x), 1e-5),
    "SwiGLU": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    "log-softmax": lambda x: (x / 0.7).log_softmax(-1),
    "rotary": lambda x: exact.rotate_halves(x.view(-1, 6, 26), *(x[:, None, :26] for _ in "cs")),
}
IN_TORCH |= dict.fromkeys(("linear in parts", "logits"), IN_TORCH["linear"])


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_near_torchs_and_has_the_same_bits_in_any_batch(name: str) -> None:
    x = normal(70, 156, seed=13)
    whole = ROWS[name](x)
    assert (whole - IN_TORCH[name](x.double())).abs().max() < NEAR
    for batch in (x[69:], x[5:8], x.flip(0)[:66], torch.cat((x[40:], x[:40]))):
        places = [int((x == row).all(1).nonzero()[0, 0]) for row in batch]
        assert torch.equal(ROWS[name](batch), whole[places])


@pytest.mark.parametrize("name", ["linear", "norm", "SwiGLU"])
def test_the_gradient_of_a_row_is_near_float64(name: str) -> None:
    x, double = normal(40, 156, seed=14).requires_grad_(), normal(40, 156, seed=14).double().requires_grad_()
    result = ROWS[name](x)
    d_result = normal(*result.shape, seed=15)
    result.backward(d_result)
    IN_TORCH[name](double).backward(d_result.double())
    assert (x.grad - double.grad).abs().max() < 4 * NEAR


def test_the_gradient_of_the_rotary_embedding_is_near_float64() -> None:
    angles = normal(9, 1, 8, seed=3).repeat(1, 1, 2)
    gradients = []
    for kind in (torch.float32, torch.float64):
        x = normal(9, 5, 16, seed=4).to(kind).requires_grad_()
        rotate = exact.rotary if kind is torch.float32 else exact.rotate_halves
        rotate(x, angles.cos().to(kind), angles.sin().to(kind)).backward(normal(9, 5, 16, seed=5).to(kind))
        gradients.append(x.grad)
    assert (gradients[0] - gradients[1]).abs().max() < NEAR


def test_a_norm_with_a_residual_has_the_bits_of_two_steps() -> None:
    x, residual, weight = normal(7, 40), normal(7, 40, seed=1), normal(40, seed=2)
    total, normed = rows_file.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rows_file.rms_norm(x + residual, weight, 1e-5))


def test_splitting_columns_over_ranks_changes_no_bit() -> None:
    x, weight = normal(5, 40), normal(150, 40, seed=1)
    whole = linear_file.matmul(x, weight, torch.float32)
    parts = [linear_file.matmul(x, part, torch.float32) for part in weight.chunk(3)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_tokens_are_those_of_the_cumulative_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    chances = (3 * normal(12, 200)).softmax(-1)
    chances[:, [0, 1, 77, 199]] = 0
    uniform = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    tokens = exact_sampling.inverse_cdf(chances, uniform)
    assert tokens[0] == 2 and tokens[1] == 198
    monkeypatch.setattr(exact_sampling, "uses_triton", lambda x: False)
    assert torch.equal(tokens[2:], exact_sampling.inverse_cdf(chances, uniform)[2:])
    for row in range(12):
        alone = rows_file.inverse_cdf(chances[row : row + 1], uniform[row : row + 1])
        assert torch.equal(alone, tokens[row : row + 1])


def test_a_temperature_of_each_row_has_the_bits_of_one_for_all() -> None:
    logits = 5 * normal(6, 100)
    temperatures = torch.full((6, 1), 0.7)
    temperatures[3] = 1.0
    mixed = exact.log_softmax(logits, temperatures)
    assert torch.equal(mixed[:3], exact.log_softmax(logits, 0.7)[:3])
    assert torch.equal(mixed[3:4], exact.log_softmax(logits[3:4], 1.0))
