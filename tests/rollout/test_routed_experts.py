"""The experts that the local engine records are those of transformers' routers, whatever the slots do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.rollout.conversations import Limits
from opo_megatron.rollout.engine import GenerationRequest, Sampling
from opo_megatron.rollout.local.engine import LocalEngine
from tests.support.conversations import InProcess, environments_of, some_time
from tests.support.hf_models import FAMILIES, QWEN3_MOE, transformers_model_with
from tests.support.local_engines import STOP, engine_of, some_requests, weights_of

SAMPLING = Sampling(max_tokens=14, stop_tokens=(STOP,), seed=(1, 2), temperature=0.8, routed_experts=True)
MOE = [family for family, model in FAMILIES.items() if model.num_moe_experts is not None]


def transformers_scores(model: torch.nn.Module, rollouts: Rollouts) -> Tensor:
    """[Σ(p + l − 1), layers, experts]: what the routers give, by one pass per sequence without a cache."""
    scores = []
    for sequence in rollouts.sequences():
        output = model(sequence[:-1].unsqueeze(0), output_router_logits=True)
        scores.append(torch.stack(output.router_logits, 1))
    return torch.cat(scores)


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("slots", [1, 3, 7, 64])
@torch.no_grad()
def test_recorded_experts_are_the_best_of_transformers_routers(
    family: str, slots: int, tmp_path: Path
) -> None:
    model = FAMILIES[family]
    engine = engine_of(model, slots, sharpness=3.0)
    # Samples of one prompt share its prefill; prompts of one token have the shortest one.
    requests = [*some_requests(8, samples=3), *some_requests(2, longest=1, seed=5)]
    rollouts = engine.generate(requests, SAMPLING)
    experts = rollouts.routed_experts
    assert experts is not None and experts.dtype == torch.uint8
    assert rollouts.response_lengths.min() < 6 and rollouts.response_lengths.max() == 14
    assert experts.shape == (int(rollouts.input_lengths.sum()), model.num_layers, model.moe_router_topk)
    reference = transformers_model_with(family, weights_of(model, 3.0), tmp_path)
    scores = transformers_scores(reference, rollouts)
    chosen = scores.gather(-1, experts.long()).sort(-1).values
    best = scores.topk(model.moe_router_topk, -1).values.sort(-1).values
    torch.testing.assert_close(chosen, best, rtol=0, atol=1e-5)
    assert len(experts.flatten(0, 1).unique(dim=0)) > 3  # tokens do not all take the same


@pytest.mark.parametrize("slots", [2, 24])
@torch.no_grad()
def test_experts_of_conversations_are_recorded_for_given_tokens_as_well(slots: int, tmp_path: Path) -> None:
    engine, requests = engine_of(QWEN3_MOE, slots, sharpness=3.0), some_requests(8, samples=3)
    environments = environments_of(len(requests))
    conversations = InProcess(requests, environments, Limits(4, 14, 64), some_time)
    sampling = replace(SAMPLING, stop_tokens=(STOP, 1, 2, 3))
    rollouts = engine.generate(requests, sampling, conversations=conversations)
    experts = rollouts.routed_experts
    assert experts is not None and rollouts.turns is not None and int(rollouts.turns.max()) > 2
    assert len(experts) == int(rollouts.input_lengths.sum())
    reference = transformers_model_with("qwen3_moe", weights_of(QWEN3_MOE, 3.0), tmp_path)
    scores = transformers_scores(reference, rollouts)
    chosen = scores.gather(-1, experts.long()).sort(-1).values
    best = scores.topk(QWEN3_MOE.moe_router_topk, -1).values.sort(-1).values
    torch.testing.assert_close(chosen, best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_recording_changes_no_response(slots: int) -> None:
    requests = some_requests(12, samples=2)
    recorded = engine_of(QWEN3_MOE, slots, 3.0).generate(requests, SAMPLING)
    plain = engine_of(QWEN3_MOE, slots, 3.0).generate(requests, replace(SAMPLING, routed_experts=False))
    assert plain.routed_experts is None
    assert recorded.responses() == plain.responses()
    assert torch.equal(recorded.engine_log_prob, plain.engine_log_prob)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "qwen3, tied"])
def test_a_dense_model_has_no_experts_to_record(family: str) -> None:
    assert engine_of(FAMILIES[family]).generate(some_requests(2), SAMPLING).routed_experts is None


@pytest.mark.parametrize("experts", [256, 257])
def test_more_than_256_experts_are_recorded_in_two_bytes(experts: int) -> None:
    model = replace(QWEN3_MOE, num_moe_experts=experts, moe_router_topk=8, moe_ffn_hidden_size=1)
    rollouts = engine_of(model).generate(some_requests(4), SAMPLING)
    assert rollouts.routed_experts is not None
    assert rollouts.routed_experts.dtype == (torch.uint8 if experts == 256 else torch.int16)
    assert int(rollouts.routed_experts.max()) > 127  # none is wrapped to a negative one
    assert int(rollouts.routed_experts.min()) >= 0


@pytest.mark.parametrize("requests", [[], [GenerationRequest(0, 0, 0, (3,))]], ids=["none", "one token"])
def test_few_requests_have_the_column_too(requests: list[GenerationRequest]) -> None:
    one = replace(SAMPLING, max_tokens=1)
    rollouts = engine_of(QWEN3_MOE).generate(requests, one)
    assert rollouts.routed_experts is not None
    assert rollouts.routed_experts.shape == (len(requests), 2, 2)


def test_a_failed_generation_leaves_nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: LocalEngine = engine_of(QWEN3_MOE)

    def fail(*_: object) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(engine.decoder, "logits", fail)
        engine.generate(some_requests(2), SAMPLING)
    assert engine.decoder.routed_experts is None
    assert engine.generate(some_requests(2), SAMPLING).routed_experts is not None
