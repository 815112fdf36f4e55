"""Routed experts stay with their tokens in micro-batches of every form; what they say of the load."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from opo_megatron.batch.expert_load import expert_counts, expert_load, load_metrics
from opo_megatron.batch.micro_batch import MicroBatch, build_micro_batches, schedule_micro_batches
from opo_megatron.batch.rollouts import Rollouts, experts_dtype
from opo_megatron.config.schema import ModelConfig
from tests.support.coordinates import parallel_of
from tests.support.paths import ROOT

CPU = torch.device("cpu")
LAYERS, K = 3, 2
OLD_RUN = ROOT / "tests/data/run_of_an_earlier_version/rollouts"


def experts_of(token: int) -> list[list[int]]:
    """[layers, k] distinct experts of a token, a function of its id."""
    return [[(token * 7 + layer) % 99, 100 + (token * 5 + layer) % 99] for layer in range(LAYERS)]


def traced_batch(count: int, seed: int) -> Rollouts:
    """Every token has an id of its own, above 0, and experts by its id."""
    rng, ids = random.Random(seed), iter(range(1, 100_000))
    prompts = [[next(ids) for _ in range(rng.randint(1, 6))] for _ in range(count)]
    responses = [[next(ids) for _ in range(rng.randint(1, 9))] for _ in range(count)]
    batch = Rollouts.from_demonstrations(prompts, responses)
    table = [experts_of(int(token)) for one in batch.sequences() for token in one[:-1]]
    batch.routed_experts = torch.tensor(table, dtype=torch.uint8).view(-1, LAYERS, K)
    return batch


def check_micro_batch(micro: MicroBatch) -> int:
    """Number of real tokens, all of which have their own experts."""
    assert micro.routed_experts is not None and micro.routed_experts.dtype == torch.uint8
    assert micro.routed_experts.shape == (*micro.tokens.shape, LAYERS, K)
    real = 0
    for token, experts in zip(
        micro.tokens.flatten().tolist(), micro.routed_experts.flatten(0, 1).tolist(), strict=True
    ):
        if token:
            assert experts == experts_of(token)
            real += 1
        assert all(len(set(layer)) == K for layer in experts)  # padding too goes to K distinct experts
    return real


@pytest.mark.parametrize(
    ("packed", "fixed_shape", "multiple", "context"),
    [
        (False, False, 1, 1), (False, False, 4, 1), (False, True, 4, 1), (True, False, 1, 1),
        (True, True, 4, 1), (True, False, 2, 2), (True, False, 3, 3), (True, True, 4, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 23])
def test_every_token_of_a_micro_batch_has_its_own_experts(
    count: int, packed: bool, fixed_shape: bool, multiple: int, context: int
) -> None:
    batch, alignment = traced_batch(count, seed=count), 1 if context == 1 else 2 * context
    lengths = batch.sequence_lengths.tolist()
    schedule = schedule_micro_batches(
        lengths, 2, 40, fixed_shape, multiple=2, packed=packed, alignment=alignment
    )
    real = 0
    for rank in range(2):
        own = batch.select(schedule.samples_of(rank))
        for part in range(context):
            built = build_micro_batches(own, schedule, rank, {}, multiple, CPU, context=(part, context))
            assert len(built) == schedule.count
            real += sum(map(check_micro_batch, built))
    assert real == int(batch.input_lengths.sum())


def test_rollouts_without_experts_give_micro_batches_without() -> None:
    batch = Rollouts.from_demonstrations([[1, 2], [3]], [[4], [5, 6]])
    schedule = schedule_micro_batches([3, 3], 1, 100)
    (micro,) = build_micro_batches(batch, schedule, 0, {}, 1, CPU)
    assert micro.routed_experts is None


def test_files_of_before_have_no_experts_and_still_read() -> None:
    files = sorted(OLD_RUN.glob("*.safetensors"))
    assert files
    for file in files:
        rollouts = Rollouts.load(file)
        assert rollouts.routed_experts is None and len(rollouts.select([1, 0])) == 2


@pytest.mark.parametrize(
    ("experts", "dtype"), [(1, torch.uint8), (128, torch.uint8), (256, torch.uint8), (257, torch.int16)]
)
def test_experts_are_stored_in_the_smallest_type_that_names_them_all(
    experts: int, dtype: torch.dtype
) -> None:
    assert experts_dtype(experts) == dtype
    assert torch.tensor([experts - 1]).to(dtype).item() == experts - 1


# ---------------------------------------------------------------------- load

UNIFORM = torch.tensor([[[0, 1]], [[2, 3]], [[1, 0]], [[3, 2]]])


@pytest.mark.parametrize(
    ("experts", "fullest", "dead"),
    [
        (UNIFORM, 1 / 4, 0.0),
        (torch.tensor([[[0, 1]], [[0, 1]]]), 1 / 2, 2 / 4),
        (torch.tensor([[[0, 1]], [[0, 2]], [[0, 3]]]), 3 / 6, 0.0),
        (torch.tensor([[[3, 2]], [[3, 1]]]), 2 / 4, 1 / 4),
        # The fullest of all layers; dead ones of all layers: 0 of layer 1, and 2 of layer 2.
        (torch.cat((UNIFORM, torch.tensor([[[0, 1]]] * 4)), 1), 1 / 2, 2 / 8),
        (torch.tensor([[[0, 1]], [[0, 255]]]).to(torch.uint8), 2 / 4, 253 / 256),
    ],
)
def test_the_fullest_expert_and_dead_ones_are_counted(experts: Tensor, fullest: float, dead: float) -> None:
    count = 256 if experts.dtype == torch.uint8 else 4
    counts = expert_counts(experts, count)
    assert counts.shape == (experts.shape[1], count) and int(counts.sum()) == experts.numel()
    assert load_metrics(counts) == {"experts/fullest_share": fullest, "experts/dead": dead}
    model = ModelConfig(experts.shape[1], 8, 8, 1, 1, 8, num_moe_experts=count)
    assert expert_load(parallel_of(), experts, model) == load_metrics(counts)


def test_a_dense_model_or_rollouts_without_experts_have_no_load() -> None:
    dense = ModelConfig(1, 8, 8, 1, 1, 8)
    assert expert_load(parallel_of(), None, ModelConfig(1, 8, 8, 1, 1, 8, num_moe_experts=4)) == {}
    assert expert_load(parallel_of(), None, dense) == {}
