"""Sampling tokens: the hash against big integers and published outputs, the tokens against brute force."""

from __future__ import annotations

import math
import random
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from opo_megatron.kernels.exact_sampling import uniforms
from opo_megatron.rollout.engine import Sampling
from opo_megatron.rollout.local.sampler import sample
from opo_megatron.utils.hashing import hash_of

ALMOST_ONE = 1 - 2.0**-53
MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """SplitMix64's output for the state after `state` (Steele, Lea & Flood 2014), in Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def params(**changes: object) -> Sampling:
    return Sampling(**{"max_tokens": 1, "stop_tokens": (), "seed": (0,), **changes})  # type: ignore[arg-type]


# ---------------------------------------------------------------------- uniforms


def test_uniforms_of_a_key_are_the_published_outputs_of_splitmix64() -> None:
    """The outputs of seed 1234567 in every implementation."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    actual = uniforms(torch.full((5,), 1234567), torch.arange(5))
    assert actual.tolist() == [(x >> 11) * 2.0**-53 for x in published]


def test_uniforms_equal_big_integer_arithmetic_bit_by_bit() -> None:
    rng = random.Random(0)
    keys = [0, -1, 1, -(1 << 63), (1 << 63) - 1] + [signed(rng.getrandbits(64)) for _ in range(2000)]
    positions = [rng.choice([0, 1, 2, 63, 30_000]) for _ in keys]
    expected = [
        (splitmix64(k + p * 0x9E3779B97F4A7C15 & MASK) >> 11) * 2.0**-53
        for k, p in zip(keys, positions, strict=True)
    ]
    assert uniforms(torch.tensor(keys), torch.tensor(positions)).tolist() == expected


def test_the_uniform_of_a_token_does_not_depend_on_its_batch() -> None:
    keys, positions = torch.arange(100) * 7919 - 300, torch.arange(100) % 9
    together = uniforms(keys, positions)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(keys[order], positions[order]), together[order])
    alone = [uniforms(keys[i : i + 1], positions[i : i + 1]) for i in range(100)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("along", ["positions", "samples"])
def test_neighbouring_uniforms_are_uniform_and_uncorrelated(along: str) -> None:
    """Kolmogorov–Smirnov at p = 0.001, and the correlation of neighbours within four standard errors."""
    count = 100_000
    if along == "positions":
        actual = uniforms(torch.full((count,), hash_of((1, 2, 3, 4))), torch.arange(count))
    else:
        keys = [hash_of((1, 2, prompt, sample)) for prompt in range(count // 8) for sample in range(8)]
        actual = uniforms(torch.tensor(keys), torch.zeros(count, dtype=torch.int64))
    assert bool((actual >= 0).all()) and bool((actual < 1).all())
    ordered, grid = actual.sort().values, torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((ordered - grid[:-1]).max(), (grid[1:] - ordered).max())
    assert float(distance) * math.sqrt(count) < 1.95
    centred = actual - 0.5
    correlation = float((centred[1:] * centred[:-1]).mean() * 12)
    assert abs(correlation) * math.sqrt(count) < 4


def test_keys_are_a_chain_of_splitmix64_and_fit_int64() -> None:
    for parts in ((0,), (1, 2, 3, 4), (-1, 10**12), ((1 << 64) - 1, 5)):
        state = 0
        for part in parts:
            state = splitmix64(state ^ part & MASK)
        assert hash_of(parts) == signed(state)


def test_keys_of_neighbouring_requests_are_distinct() -> None:
    keys = {
        hash_of((seed, step, prompt, sample))
        for seed in range(5)
        for step in range(10)
        for prompt in range(250)
        for sample in range(8)
    }
    assert len(keys) == 100_000
    assert len({hash_of((1, 2)), hash_of((2, 1)), hash_of((1, 2, 0)), hash_of((3,))}) == 4


# ---------------------------------------------------------------------- sampling


def some_logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def brute_force_sample(logits: list[float], uniform: float, sampling: Sampling) -> int:
    """Scale, sort, truncate to top_k, then to top_p of the rest, and invert the cumulative sum."""
    scaled = [z / sampling.temperature for z in logits]
    probabilities = [math.exp(z - max(scaled)) for z in scaled]
    ranked = sorted(range(len(logits)), key=lambda v: -probabilities[v])
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    nucleus, mass, total = [], 0.0, sum(probabilities[v] for v in ranked)
    for v in ranked:
        if mass >= sampling.top_p * total:
            break
        nucleus.append(v)
        mass += probabilities[v]
    nucleus.sort()
    cumulative = list(accumulate(probabilities[v] for v in nucleus))
    return next(v for v, bound in zip(nucleus, cumulative, strict=True) if bound > uniform * cumulative[-1])


@pytest.mark.parametrize(
    "truncation",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 1},
        {"top_k": 4},
        {"top_k": 99},
        {"top_p": 0.6},
        {"top_p": 1e-9},
        {"top_k": 5, "top_p": 0.7, "temperature": 1.5},
    ],
)
def test_samples_equal_brute_force_over_the_range_of_uniforms(truncation: dict[str, float]) -> None:
    logits, grid = some_logits(8, 13), torch.linspace(0, ALMOST_ONE, 101, dtype=torch.float64)
    sampling = params(**truncation)
    for row in logits:
        tokens, *_ = sample(row.expand(101, 13), grid, sampling)
        assert tokens.tolist() == [brute_force_sample(row.tolist(), u, sampling) for u in grid.tolist()]


def test_greedy_takes_the_argmax_whatever_the_uniform() -> None:
    logits = some_logits(50, 13)
    for u in (0.0, 0.5, ALMOST_ONE):
        tokens, *_ = sample(logits, torch.full((50,), u, dtype=torch.float64), params(greedy=True))
        assert torch.equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("truncation", [{}, {"top_k": 2}, {"top_p": 0.3}, {"greedy": True}])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_policy_under_any_truncation(
    truncation: dict[str, int], temperature: float
) -> None:
    logits, uniform = some_logits(50, 13), torch.rand(50, dtype=torch.float64)
    tokens, log_prob, _ = sample(logits, uniform, params(temperature=temperature, **truncation))
    expected = (logits.double() / temperature).log_softmax(1)[torch.arange(50), tokens]
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-6, atol=1e-6)


def test_tokens_of_probability_zero_are_never_sampled() -> None:
    """First, last and inner tokens of probability zero: masked, or underflowing in fp32."""
    for impossible in (-math.inf, -1000.0):
        logits = torch.tensor([[impossible, 0.0, impossible, 1.0, impossible]])
        for u, token in ((0.0, 1), (ALMOST_ONE, 3)):
            assert sample(logits, torch.tensor([u], dtype=torch.float64), params())[0].tolist() == [token]
        grid = torch.linspace(0, ALMOST_ONE, 1001, dtype=torch.float64)
        sampled, log_prob, _ = sample(logits.expand(1001, 5), grid, params())
        assert set(sampled.tolist()) == {1, 3}
        assert bool(torch.isfinite(log_prob).all())


@pytest.mark.parametrize("vocabulary", [3, 21, 5000])
def test_the_ends_of_the_unit_interval_sample_first_and_last_token(vocabulary: int) -> None:
    """Whatever the cumulative sum rounds to: 1 − 2⁻⁵³ is the largest uniform."""
    logits = some_logits(200, vocabulary)
    logits[:, 0] = logits[:, -1] = -math.inf
    for u, token in ((0.0, 1), (ALMOST_ONE, vocabulary - 2)):
        sampled, *_ = sample(logits, torch.full((200,), u, dtype=torch.float64), params())
        assert sampled.tolist() == [token] * 200


def test_frequencies_are_the_probabilities_on_an_even_grid() -> None:
    """With u at the midpoints of n cells, each token's count is n·π up to one per end of its interval."""
    logits, n = some_logits(1, 21), 100_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, *_ = sample(logits.expand(n, 21), grid, params(temperature=0.8))
    expected = n * (logits[0].double() / 0.8).softmax(0)
    assert float((torch.bincount(tokens, minlength=21) - expected).abs().max()) <= 1.05
