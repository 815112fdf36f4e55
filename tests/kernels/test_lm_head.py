"""`chunked_logprobs` of the LM head against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opo_megatron.algorithm.objective import PolicyGradient, Supervised
from opo_megatron.kernels.lm_head import (
    HeadOutput,
    _adds_in_float32,
    chunked_logprobs,
    default_chunk_tokens,
)
from tests.support.lm_head_reference import WHOLE, Inputs, assert_near, likelihood_and_square, reference

SHAPES = [(1, 4, 5), (7, 8, 21), (64, 16, 33), (129, 24, 300)]


def run(inputs: Inputs, temperature: float, chunk: int, d_weight: Tensor | None) -> HeadOutput:
    def coefficient(log_prob: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        advantages = inputs.advantages[part]
        return likelihood_and_square(log_prob, advantages), -advantages + 0.2 * log_prob

    return chunked_logprobs(
        inputs.hidden, inputs.weight, inputs.targets, WHOLE, temperature, chunk, coefficient, d_weight
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients_equal_float64_autograd(shape: tuple[int, int, int], temperature: float) -> None:
    inputs = Inputs.random(*shape)
    buffer = torch.randn(inputs.weight.shape, generator=torch.Generator().manual_seed(1))
    d_weight = buffer.clone()
    output = run(inputs, temperature, chunk=10, d_weight=d_weight)
    tokens, d_hidden, expected = reference(inputs, temperature)
    for name, values in tokens.items():
        assert_near(getattr(output, name), values)
    assert_near(output.d_hidden, d_hidden)
    assert_near(d_weight, buffer.double() + expected)


@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 65, 10_000])
def test_the_chunk_size_changes_results_only_by_rounding(chunk: int) -> None:
    inputs = Inputs.random(64, 16, 33)
    whole_weight, weight = torch.zeros_like(inputs.weight), torch.zeros_like(inputs.weight)
    whole = run(inputs, 1.3, 64, whole_weight)
    chunked = run(inputs, 1.3, chunk, weight)
    for name in ("log_prob", "entropy", "sum_squares", "loss", "d_hidden"):
        assert_near(getattr(chunked, name), getattr(whole, name).double(), 2e-6)
    assert_near(weight, whole_weight.double(), 2e-6)


def test_no_tokens_give_empty_results_and_no_weight_gradient() -> None:
    inputs = Inputs.random(0, 8, 21)
    d_weight = torch.full((21, 8), 3.0)
    output = run(inputs, 1.0, 16, d_weight)
    assert output.loss is not None and output.d_hidden is not None
    assert output.log_prob.shape == output.loss.shape == (0,)
    assert output.d_hidden.shape == (0, 8)
    assert bool((d_weight == 3.0).all())


def test_without_an_objective_only_the_distribution_is_computed() -> None:
    inputs = Inputs.random(7, 8, 21)
    output = chunked_logprobs(inputs.hidden, inputs.weight, inputs.targets, WHOLE, 1.0, 3)
    tokens, _, _ = reference(inputs, 1.0)
    assert output.loss is None and output.d_hidden is None
    for name in ("log_prob", "entropy", "sum_squares"):
        assert_near(getattr(output, name), tokens[name])


@pytest.mark.parametrize("offset", [0.0, 5000.0])
def test_large_logits_give_finite_accurate_results(offset: float) -> None:
    """Logits of ±80 around an offset; probabilities of e⁻¹⁶⁰ underflow in fp32, log-probabilities do not."""
    hidden = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[80.0, offset], [-80.0, offset], [0.0, offset]])
    inputs = Inputs(hidden, weight, torch.tensor([1, 1, 0]), torch.ones(3))
    d_weight = torch.zeros_like(weight)
    output = run(inputs, 1.0, 2, d_weight)
    tokens, d_hidden, expected = reference(inputs, 1.0)
    assert output.log_prob.tolist() == [-160.0, 0.0, 0.0]
    for name in ("log_prob", "loss"):
        assert_near(getattr(output, name), tokens[name])
    torch.testing.assert_close(output.entropy, tokens["entropy"].float(), rtol=0, atol=1e-12)
    assert output.sum_squares.tolist() == [1.0, 1.0, 1.0]
    assert_near(output.d_hidden, d_hidden)
    assert_near(d_weight, expected)


def test_uniform_logits_have_entropy_log_vocabulary_size() -> None:
    output = chunked_logprobs(torch.zeros(3, 4), torch.randn(50, 4), torch.tensor([0, 7, 49]), WHOLE, 0.5, 2)
    log = float(torch.tensor(50.0).log())
    assert output.entropy.tolist() == pytest.approx([log] * 3, rel=1e-6)
    assert output.log_prob.tolist() == pytest.approx([-log] * 3, rel=1e-6)
    assert output.sum_squares.tolist() == pytest.approx([1 / 50] * 3, rel=1e-6)


def test_bf16_gradients_accumulate_in_fp32() -> None:
    """512 equal tokens in chunks of one: in bf16 the sum of equal terms stops growing at 256 of them."""
    inputs = Inputs.random(1, 8, 21)
    hidden = inputs.hidden.bfloat16().expand(512, 8).contiguous()
    weight = inputs.weight.bfloat16()
    d_weight = torch.zeros(21, 8)
    targets = inputs.targets.expand(512)

    def minus_log_prob(log_prob: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return -log_prob, torch.full_like(log_prob, -1.0)

    output = chunked_logprobs(hidden, weight, targets, WHOLE, 1.0, 1, minus_log_prob, d_weight)
    logits = (hidden[:1].double() @ weight.double().T).softmax(-1)
    d_logits = logits - torch.nn.functional.one_hot(inputs.targets, 21)
    assert_near(d_weight, 512 * d_logits.T @ hidden[:1].double(), 1e-2)
    assert output.d_hidden is not None and output.d_hidden.dtype == torch.bfloat16
    assert_near(output.d_hidden, (d_logits @ weight.double()).expand(512, 8), 2e-2)


def test_objectives_are_negative_weighted_mean_log_probs() -> None:
    inputs = Inputs.random(40, 8, 21)
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double()
    log_prob = torch.log_softmax(hidden @ weight.T / 0.8, -1)[torch.arange(40), inputs.targets]
    columns = {"advantages": inputs.advantages}
    for objective, expected in (
        (PolicyGradient(5.0, temperature=0.8), -(inputs.advantages * log_prob).sum() / 5),
        (Supervised(40.0, temperature=0.8), -log_prob.mean()),
    ):
        output = chunked_logprobs(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            WHOLE,
            objective.temperature,
            16,
            lambda ell, part, objective=objective: objective(
                ell, {name: columns[name][part] for name in objective.columns}
            ),
        )
        assert output.loss is not None
        assert float(output.loss.double().sum()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert_near(output.d_hidden, torch.autograd.grad(expected, hidden, retain_graph=True)[0])


def test_a_chunk_on_a_cpu_has_512_to_1024_tokens() -> None:
    assert [default_chunk_tokens(rows) for rows in (100, 16384, 20000, 150000)] == [1024, 1024, 838, 512]


@pytest.mark.parametrize("rows", [100, 16384, 32000, 131072, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_on_a_gpu_fills_512_mib_in_whole_tiles(rows: int, dtype: torch.dtype) -> None:
    tokens = default_chunk_tokens(rows, dtype, torch.device("cuda"))
    assert 512 <= tokens <= 8192 and tokens % 128 == 0
    assert tokens * rows * dtype.itemsize <= 2**29
    assert tokens == 8192 or (tokens + 128) * rows * dtype.itemsize > 2**29


def test_a_chunk_of_the_largest_vocabularies_fills_two_waves() -> None:
    assert default_chunk_tokens(131072, torch.bfloat16, torch.device("cuda")) == 2048


def test_a_chunk_on_a_gpu_has_at_least_512_tokens() -> None:
    assert default_chunk_tokens(10**6, torch.bfloat16, torch.device("cuda")) == 512


def test_torch_without_in_place_float32_addmm_warns() -> None:
    """True of every torch on a CPU."""
    with pytest.warns(UserWarning, match="cannot add a product of torch.bfloat16 to float32 in place"):
        assert not _adds_in_float32(torch.device("cpu"), torch.bfloat16)
