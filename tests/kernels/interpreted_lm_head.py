"""Softmax and gradient of the LM head: the kernels in Triton's interpreter against float64.

Run by test_kernels.py, which sets TRITON_INTERPRET=1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from opo_megatron import kernels
from opo_megatron.algorithm.objective import PolicyGradient
from opo_megatron.kernels import lm_head as head_file
from opo_megatron.kernels import triton_softmax as head_softmax
from opo_megatron.kernels.lm_head import HeadOutput, VocabularyShard, chunked_logprobs
from opo_megatron.policy.metric_sums import MetricSums
from opo_megatron.policy.token_loss import TokenLoss
from tests.support.kernel_probes import Counted, poison_new_memory
from tests.support.lm_head_reference import Inputs, assert_near, reference

SIZES = ((1, 1), (1, 5), (3, 64), (7, 65), (4, 300))
WHOLE = VocabularyShard(0)
BF16_BITS = 2**-7
"""The interpreter truncates where a GPU rounds: up to one unit in the last place."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> tuple[Counted, Counted]:
    counted = Counted(head_softmax._statistics_kernel), Counted(head_softmax._gradient_kernel)
    monkeypatch.setattr(head_softmax, "_statistics_kernel", counted[0])
    monkeypatch.setattr(head_softmax, "_gradient_kernel", counted[1])
    monkeypatch.setattr(head_softmax, "BLOCK", 64)
    monkeypatch.setattr(kernels, "uses_triton", lambda device: True)
    poison_new_memory(monkeypatch)
    return counted


def logits_of(tokens: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[m, V] with 7 NaN elements between rows; and targets, some of another shard."""
    generator = torch.Generator().manual_seed(0)
    values = 6 * torch.randn(tokens, rows, generator=generator)
    logits = torch.full((tokens, rows + 7), float("nan"), dtype=dtype)[:, :rows]
    logits.copy_(values)
    return logits, 100 + torch.randint(-3, rows + 3, (tokens,), generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_passes_equal_float64(size: tuple[int, int], temperature: float, dtype: torch.dtype) -> None:
    tokens, rows = size
    logits, targets = logits_of(tokens, rows, dtype)
    z, c = logits.double(), torch.linspace(-2, 3, tokens)
    statistics = head_softmax.row_statistics(logits, targets, 100, temperature)
    x = (z - z.amax(1, keepdim=True)) / temperature
    e = x.exp()
    owned = (targets >= 100) & (targets < 100 + rows)
    row = (targets - 100).clamp(0, rows - 1).unsqueeze(1)
    expected = {
        "highest": z.amax(1),
        "total": e.sum(1),
        "weighted": (e * x).sum(1),
        "squares": e.square().sum(1),
        "target": torch.where(owned, z.gather(1, row)[:, 0], 0.0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(statistics, name).double(), values, rtol=1e-6, atol=1e-7)
    dz = head_softmax.gradient_in_place(
        logits, targets, 100, temperature, statistics.highest, statistics.total, c
    )
    onehot = torch.zeros_like(z).scatter_(1, row, owned.double().unsqueeze(1))
    expected_gradient = (c.double() / temperature).unsqueeze(1) * (onehot - e / e.sum(1, keepdim=True))
    bits = BF16_BITS if dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(dz.double(), expected_gradient, rtol=bits, atol=5e-7)
    assert dz.data_ptr() == logits.data_ptr()
    assert dz.as_strided((tokens, 7), (rows + 7, 1), rows)[:-1].isnan().all()  # between the rows


def test_offsets_beyond_31_bits_reach_their_row(tmp_path: Path) -> None:
    stride = 2**30  # elements of a sparse file: the third row starts at 2³¹
    file = str(tmp_path / "logits")
    storage = torch.from_file(file, shared=True, size=2 * stride + 70, dtype=torch.bfloat16)
    logits = storage.as_strided((3, 70), (stride, 1))
    logits.copy_(torch.arange(210).view(3, 70) / 16)
    z, targets, c = logits.double(), torch.tensor([0, 69, 3]), torch.ones(3)
    statistics = head_softmax.row_statistics(logits, targets, 0, 1.0)
    assert statistics.highest.tolist() == z.amax(1).tolist()
    head_softmax.gradient_in_place(logits, targets, 0, 1.0, statistics.highest, statistics.total, c)
    expected_gradient = torch.nn.functional.one_hot(targets, 70) - z.softmax(1)
    torch.testing.assert_close(logits.double(), expected_gradient, rtol=BF16_BITS, atol=1e-6)


def run_with_gradient(
    inputs: Inputs, temperature: float, chunk: int, sums: MetricSums
) -> tuple[HeadOutput, Tensor]:
    """`chunked_logprobs` with OPO's objective."""
    engine = -torch.rand(len(inputs.targets), generator=torch.Generator().manual_seed(2))
    columns = {"advantages": inputs.advantages, "engine_log_prob": engine}
    tokens = TokenLoss(PolicyGradient(5.0, temperature, 2.0), columns, sums)
    d_weight = torch.ones(inputs.weight.shape)
    arguments = (inputs.hidden, inputs.weight, inputs.targets, WHOLE, temperature, chunk, tokens, d_weight)
    output = chunked_logprobs(*arguments)
    tokens.add_mismatch(output.log_prob)
    return output, d_weight


@pytest.mark.parametrize("shape", [(1, 4, 5), (7, 8, 21), (70, 24, 300)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kernels_with_gradient_equal_the_torch_reference(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], temperature: float
) -> None:
    inputs = Inputs.random(*shape)
    sums, expected_sums = (MetricSums(torch.device("cpu"), True) for _ in range(2))
    output, d_weight = run_with_gradient(inputs, temperature, 60, sums)
    monkeypatch.setattr(kernels, "uses_triton", lambda device: False)
    expected, expected_d_weight = run_with_gradient(inputs, temperature, 60, expected_sums)
    for name, values in vars(expected).items():
        assert_near(getattr(output, name), values.double(), 2e-6)
    assert_near(d_weight, expected_d_weight.double(), 2e-6)
    torch.testing.assert_close(sums.mismatch.values, expected_sums.mismatch.values, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_log_probs_alone_are_one_launch_per_chunk(
    launches: tuple[Counted, Counted], temperature: float
) -> None:
    inputs = Inputs.random(20, 8, 130)
    output = chunked_logprobs(inputs.hidden, inputs.weight, inputs.targets, WHOLE, temperature, 8)
    assert [counted.launches for counted in launches] == [3, 0]
    tokens, _, _ = reference(inputs, temperature)
    for name in ("log_prob", "entropy", "sum_squares"):
        assert_near(getattr(output, name), tokens[name], 1e-6)


def test_a_chunk_with_gradient_is_two_launches(launches: tuple[Counted, Counted]) -> None:
    run_with_gradient(Inputs.random(20, 8, 130), 1.0, 8, MetricSums(torch.device("cpu"), True))
    assert [counted.launches for counted in launches] == [3, 3]


def test_no_tokens_launch_nothing(launches: tuple[Counted, Counted]) -> None:
    output, d_weight = run_with_gradient(
        Inputs.random(0, 8, 21), 1.0, 8, MetricSums(torch.device("cpu"), True)
    )
    assert [counted.launches for counted in launches] == [0, 0]
    assert output.log_prob.shape == (0,) and (d_weight == 1).all()


def test_large_logits_give_finite_accurate_results() -> None:
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[80.0, 5000.0], [-80.0, 5000.0], [0.0, 5000.0]])
    inputs = Inputs(hidden, weight, torch.tensor([1, 1, 0]), torch.ones(3))
    output = chunked_logprobs(hidden, weight, inputs.targets, WHOLE, 1.0, 2)
    for name in ("log_prob", "entropy", "sum_squares"):
        assert_near(getattr(output, name), reference(inputs, 1.0)[0][name])


def test_a_nan_logit_affects_only_its_tokens_log_prob() -> None:
    inputs = Inputs.random(5, 8, 130)
    inputs.hidden[3, 2] = float("nan")
    output = chunked_logprobs(inputs.hidden, inputs.weight, inputs.targets, WHOLE, 1.0, 8)
    assert output.log_prob.isnan().tolist() == [False, False, False, True, False]


def test_bf16_is_accurate_up_to_rounding() -> None:
    inputs = Inputs.random(40, 16, 130)
    inputs = Inputs(inputs.hidden.bfloat16(), inputs.weight.bfloat16(), inputs.targets, inputs.advantages)
    d_weight = torch.zeros(130, 16)

    def minus_log_prob(log_prob: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return -log_prob, torch.full_like(log_prob, -1.0)

    output = chunked_logprobs(
        inputs.hidden, inputs.weight, inputs.targets, WHOLE, 1.0, 16, minus_log_prob, d_weight
    )
    h, w = inputs.hidden.double(), inputs.weight.double()
    log_pi = (h @ w.T).log_softmax(1)
    dz = log_pi.exp() - torch.nn.functional.one_hot(inputs.targets, 130)
    assert_near(output.log_prob, log_pi.gather(1, inputs.targets.unsqueeze(1))[:, 0], 1e-2)
    assert output.d_hidden is not None and output.d_hidden.dtype == torch.bfloat16
    assert_near(output.d_hidden, dz @ w, 2e-2)
    assert_near(d_weight, dz.T @ h, 2e-2)


class SequentialAllReduce:
    """All-reduces of two ranks that run in turn; a pass stops at the first unavailable result."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []
        self.pending: list[tuple[Tensor, Any]] = []
        self.index = 0

    class NotAvailable(Exception):
        pass

    def __call__(self, values: Tensor, vocabulary: VocabularyShard, operation: Any) -> None:
        if self.index == len(self.results):
            self.pending.append((values.clone(), operation))
            raise self.NotAvailable
        values.copy_(self.results[self.index])
        self.index += 1

    def complete(self) -> None:
        (first, operation), (second, _) = self.pending
        is_max = operation == torch.distributed.ReduceOp.MAX
        self.results.append(torch.maximum(first, second) if is_max else first + second)
        self.pending = []


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("boundary", [1, 70])
def test_two_vocabulary_shards_equal_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch, boundary: int, temperature: float
) -> None:
    inputs = Inputs.random(9, 8, 130)
    inputs.weight[:boundary] *= 3  # one shard's largest logits are far above the other's
    reduce = SequentialAllReduce()
    monkeypatch.setattr(head_file, "_reduce", reduce)

    def coefficient(log_prob: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        advantages = inputs.advantages[part]
        return -advantages * log_prob + 0.1 * log_prob**2, -advantages + 0.2 * log_prob

    results: list[tuple[HeadOutput, Tensor]] = []
    while not results:
        for rows in (slice(0, boundary), slice(boundary, 130)):
            reduce.index, weight = 0, inputs.weight[rows]
            d_weight, shard = torch.zeros_like(weight), VocabularyShard(rows.start, group="both")
            arguments = (inputs.hidden, weight, inputs.targets, shard, temperature, 16, coefficient, d_weight)
            try:
                results.append((chunked_logprobs(*arguments), d_weight))
            except SequentialAllReduce.NotAvailable:
                continue
        if reduce.pending:
            reduce.complete()
    tokens, d_hidden, expected = reference(inputs, temperature)
    for output, _ in results:
        for name, values in tokens.items():
            assert_near(getattr(output, name), values, 2e-6)
    parts = [output.d_hidden for output, _ in results if output.d_hidden is not None]
    assert len(parts) == 2
    assert_near(parts[0] + parts[1], d_hidden, 2e-6)
    assert_near(torch.cat([d_weight for _, d_weight in results]), expected, 2e-6)
