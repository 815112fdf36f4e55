"""The local engine against transformers, and against itself with other batch sizes and orders."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opo_megatron.batch.rollouts import FINISH_LENGTH, FINISH_STOP, Rollouts
from opo_megatron.errors import UserError
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from tests.support.hf_models import FAMILIES, LLAMA, VOCAB_SIZE, transformers_model_with
from tests.support.local_engines import STOP, engine_of, some_requests, weights_of


def log_probs_of(model: torch.nn.Module, rollouts: Rollouts, temperature: float = 1.0) -> Tensor:
    """[Σl]: log π_T of the response tokens by one forward pass per sequence, without a cache."""
    log_probs = []
    for sequence, prompt in zip(rollouts.sequences(), rollouts.prompt_lengths.tolist(), strict=True):
        logits = model(sequence.unsqueeze(0)).logits[0, prompt - 1 : -1].double() / temperature
        log_probs.append(logits.log_softmax(-1).gather(1, sequence[prompt:].unsqueeze(1))[:, 0])
    return torch.cat(log_probs)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recorded_log_probs_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    engine = engine_of(FAMILIES[family], slots=5, sharpness=3.0)
    sampling = Sampling(max_tokens=14, stop_tokens=(STOP,), seed=(1, 2), temperature=0.8)
    rollouts = engine.generate(some_requests(8, samples=3), sampling)
    assert rollouts.engine_log_prob is not None
    lengths = rollouts.response_lengths
    assert lengths.min() < 6 and lengths.max() == 14
    reference = transformers_model_with(family, weights_of(FAMILIES[family], 3.0), tmp_path)
    error = rollouts.engine_log_prob - log_probs_of(reference, rollouts, temperature=0.8)
    assert float(error.abs().max()) <= 2e-5


@torch.no_grad()
def test_greedy_takes_the_argmax_of_transformers_at_every_step(tmp_path: Path) -> None:
    reference = transformers_model_with("qwen3, tied", weights_of(FAMILIES["qwen3, tied"], 3.0), tmp_path)
    sampling = Sampling(max_tokens=6, stop_tokens=(STOP,), seed=(0,), greedy=True)
    requests = some_requests(10)
    rollouts = engine_of(FAMILIES["qwen3, tied"], 4, 3.0).generate(requests, sampling)
    for request, response in zip(requests, rollouts.responses(), strict=True):
        tokens = list(request.tokens)
        while len(tokens) < len(request.tokens) + 6 and tokens[len(request.tokens) :][-1:] != [STOP]:
            tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert response == tokens[len(request.tokens) :]


@cache
def reference_rollouts() -> tuple[list[GenerationRequest], Sampling, Rollouts]:
    requests = some_requests(64, samples=4)
    sampling = Sampling(max_tokens=8, stop_tokens=(STOP, 5), seed=(1, 2))
    return requests, sampling, engine_of(LLAMA, slots=256, sharpness=2.0).generate(requests, sampling)


def assert_same_responses(actual: Rollouts, expected: Rollouts) -> None:
    assert actual.responses() == expected.responses()
    assert torch.equal(actual.finish_reasons, expected.finish_reasons)
    assert actual.engine_log_prob is not None and expected.engine_log_prob is not None
    torch.testing.assert_close(actual.engine_log_prob, expected.engine_log_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 7, 64])
def test_responses_do_not_depend_on_the_number_of_slots(slots: int) -> None:
    requests, sampling, expected = reference_rollouts()
    assert expected.response_lengths.unique().numel() == 8  # rows are refilled at different times
    engine = engine_of(LLAMA, slots, sharpness=2.0)
    count = min(len(requests), 40 * slots)
    requests, expected = requests[:count], expected.select(range(count))
    assert_same_responses(engine.generate(requests, sampling), expected)


def test_the_kv_cache_of_an_earlier_call_has_no_effect() -> None:
    requests, sampling, expected = reference_rollouts()
    engine = engine_of(LLAMA, slots=64, sharpness=2.0)
    longer = some_requests(40, samples=2, longest=25, seed=9)
    engine.generate(longer, replace(sampling, max_tokens=30, stop_tokens=()))
    kept = engine.cache(1, 1)
    assert_same_responses(engine.generate(requests, sampling), expected)
    assert engine.cache(1, 1) is kept, "the cache was reallocated"


def test_responses_do_not_depend_on_the_order_of_requests() -> None:
    requests, sampling, expected = reference_rollouts()
    order = random.Random(5).sample(range(len(requests)), len(requests))
    engine = engine_of(LLAMA, 24, sharpness=2.0)
    actual = engine.generate([requests[i] for i in order], sampling)
    assert actual.prompt_ids.tolist() == [requests[i].prompt_id for i in order]
    assert_same_responses(actual, expected.select(order))


def test_responses_depend_on_seed_prompt_and_sample_not_on_the_group() -> None:
    engine = engine_of(LLAMA)
    sampling = Sampling(max_tokens=12, stop_tokens=(), seed=(1, 2))
    request = GenerationRequest(5, 0, 0, (1, 2, 3))

    def generate(request: GenerationRequest, sampling: Sampling = sampling) -> list[int]:
        return engine.generate([request], sampling).responses()[0]

    assert generate(replace(request, group=9)) == generate(request)
    others = [
        generate(replace(request, prompt_id=6)),
        generate(replace(request, sample_index=1)),
        generate(request, replace(sampling, seed=(1, 3))),
        generate(request, replace(sampling, seed=(2, 2))),
    ]
    assert len({tuple(tokens) for tokens in [generate(request), *others]}) == 5


def test_a_response_ends_with_a_stop_token_or_is_truncated() -> None:
    _, sampling, rollouts = reference_rollouts()
    reasons = rollouts.finish_reasons.tolist()
    assert set(reasons) == {FINISH_STOP, FINISH_LENGTH}
    for response, reason in zip(rollouts.responses(), reasons, strict=True):
        assert not set(response[:-1]) & set(sampling.stop_tokens)
        assert (response[-1] in sampling.stop_tokens) == (reason == FINISH_STOP)
        assert reason == FINISH_STOP or len(response) == sampling.max_tokens


def test_a_stop_token_at_the_length_limit_is_a_stop() -> None:
    every_token = tuple(range(VOCAB_SIZE))
    sampling = Sampling(max_tokens=1, stop_tokens=every_token, seed=(1,))
    rollouts = engine_of(LLAMA).generate(some_requests(5), sampling)
    assert rollouts.finish_reasons.tolist() == [FINISH_STOP] * 5
    assert rollouts.response_lengths.tolist() == [1] * 5


def test_rollouts_carry_the_requests_and_the_version_of_the_weights() -> None:
    requests, _, rollouts = reference_rollouts()
    assert rollouts.prompt_ids.tolist() == [r.prompt_id for r in requests]
    assert rollouts.groups.tolist() == [r.group for r in requests]
    assert rollouts.sample_indices.tolist() == [r.sample_index for r in requests]
    assert rollouts.prompt_tokens.tolist() == [t for r in requests for t in r.tokens]
    assert rollouts.weight_versions is not None
    assert rollouts.weight_versions.tolist() == [7] * int(rollouts.response_lengths.sum())


def test_no_requests_give_no_rollouts() -> None:
    sampling = Sampling(max_tokens=4, stop_tokens=(STOP,), seed=(1,))
    assert len(engine_of(LLAMA).generate([], sampling)) == 0


def test_progress_is_monotonic_and_has_the_total() -> None:
    engine, updates = engine_of(LLAMA, slots=4), []
    sampling = Sampling(max_tokens=5, stop_tokens=(STOP,), seed=(1,))
    rollouts = engine.generate(some_requests(9), sampling, lambda *counts: updates.append(counts))
    assert len(updates) > 5 and updates == sorted(updates) and {total for _, total, _ in updates} == {9}
    assert updates[-1][2] < int(rollouts.response_lengths.sum()) <= updates[-1][2] + engine.slots


# ---------------------------------------------------------------------- weights


def test_a_weight_stream_without_a_tensor_leaves_no_version() -> None:
    engine = engine_of(LLAMA)
    named = list(weights_of(LLAMA).items())
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        engine.update_weights([[item for item in named if item[0] != "model.norm.weight"]], version=8)
    assert engine.version is None
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(some_requests(1), Sampling(max_tokens=1, stop_tokens=(), seed=(0,)))
    engine.update_weights([named], version=9)
    assert engine.version == 9


@pytest.mark.parametrize("extra", ["model.norm.weight", "model.layers.9.input_layernorm.weight"])
def test_a_duplicate_or_unknown_tensor_is_rejected(extra: str) -> None:
    engine = engine_of(LLAMA)
    named = [*weights_of(LLAMA).items(), (extra, torch.ones(32))]
    with pytest.raises(ValueError, match=extra.replace(".", r"\.")):
        engine.update_weights([named], version=8)
    assert engine.version is None


def test_an_interrupted_weight_stream_leaves_no_version() -> None:
    engine = engine_of(LLAMA)

    def broken() -> Iterator[list[tuple[str, Tensor]]]:
        yield list(weights_of(LLAMA).items())
        raise ConnectionError

    with pytest.raises(ConnectionError):
        engine.update_weights(broken(), version=8)
    assert engine.version is None


@pytest.mark.parametrize(("prompt", "fits"), [(54, True), (55, False)])
def test_a_prompt_too_long_for_its_response_is_rejected(prompt: int, fits: bool) -> None:
    engine = engine_of(LLAMA)
    requests = [GenerationRequest(0, 0, 0, (1,)), GenerationRequest(1, 1, 0, (1,) * prompt)]
    sampling = Sampling(max_tokens=10, stop_tokens=(), seed=(0,))
    if fits:
        assert engine.generate(requests, sampling).response_lengths.tolist() == [10, 10]
        return
    with pytest.raises(UserError, match=r"55 tokens.*max_response_tokens=10.*max_sequence_length=64"):
        engine.generate(requests, sampling)


@torch.no_grad()
def test_frequencies_of_20000_first_tokens_match_their_probabilities() -> None:
    """Pearson's χ² of the counts; the survival function is the regularised upper incomplete gamma."""
    engine, count = engine_of(LLAMA, slots=1000), 20_000
    prompt = (4, 8, 15, 16)
    requests = [GenerationRequest(11, 0, sample, prompt) for sample in range(count)]
    rollouts = engine.generate(requests, Sampling(max_tokens=1, stop_tokens=(), seed=(1, 2)))
    assert rollouts.engine_log_prob is not None
    probabilities = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    for token in range(VOCAB_SIZE):
        matches = rollouts.response_tokens == token
        probabilities[token] = rollouts.engine_log_prob[matches][0].double().exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5)
    expected = count * probabilities
    assert float(expected.min()) > 5
    counts = torch.bincount(rollouts.response_tokens, minlength=VOCAB_SIZE)
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((VOCAB_SIZE - 1) / 2, dtype=torch.float64)
    assert float(torch.special.gammaincc(freedom, statistic / 2)) > 0.001
