"""Digests of weights and rollouts: against big-integer arithmetic, under every cut, and what changes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opo_megatron.audit.digest import Positions, digest_shard, owns_digest
from opo_megatron.audit.record import digest_rollouts
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.schema import ModelConfig
from opo_megatron.utils.hashing import FACTORS, GOLDEN, MASK, hash_of_text, mix
from opo_megatron.weights.param_mapping import Stages, parameters
from opo_megatron.weights.random_init import random_weights
from opo_megatron.weights.stream import read_shard
from tests.support.coordinates import parallel_of
from tests.support.fixtures import VOCAB_SIZE, ragged_rollouts, small_config

MOE = ("policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=24")
BIASED = ("policy.model.add_qkv_bias=true", "policy.model.tie_embeddings=true")


def by_big_integers(name: str, tensor: Tensor) -> int:
    """The definition, element by element."""
    bits = tensor.flatten().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).tolist()
    seed = hash_of_text(name) & MASK
    return sum(mix((value * FACTORS[0] ^ (i + 1) * GOLDEN ^ seed) & MASK) for i, value in enumerate(bits)) % (
        1 << 64
    )


def all_digests(
    model: ModelConfig, source: Callable[[str], Tensor], tp: int, pp: int, ep: int, dp: int
) -> dict[str, tuple[int, float]]:
    """What the ranks of a layout find, added up."""
    padded = -(-VOCAB_SIZE // tp) * tp + 2 * tp
    table = parameters(model, VOCAB_SIZE, Stages(model.num_layers, pp), ep, padded)
    found: dict[str, tuple[int, float]] = {}
    for rank in range(tp * pp * dp):
        tp_rank, dp_rank, pp_rank = rank % tp, rank // tp % dp, rank // tp // dp
        ep_rank = rank % (tp * dp) % ep if ep > 1 else 0
        parallel = parallel_of(
            tp_rank=tp_rank, tp_size=tp, pp_rank=pp_rank, pp_size=pp, dp_cp_rank=dp_rank, dp_cp_size=dp,
            ep_rank=ep_rank, ep_size=ep, edp_rank=rank % (tp * dp) // ep if ep > 1 else dp_rank,
            etp_rank=0 if ep > 1 else tp_rank, etp_size=1 if ep > 1 else tp,
        )  # fmt: skip
        for turn, parameter in enumerate(table):
            if owns_digest(parameter, parallel, turn):
                tensors = parameter.tensors[ep_rank if parameter.is_expert else 0]
                places = {
                    name: Positions(shape, label, parallel.device)
                    for label, (name, shape) in enumerate(tensors)
                }
                positions = read_shard(parameter, parallel, places.__getitem__)
                sums, squares = digest_shard(
                    read_shard(parameter, parallel, source), positions, [name for name, _ in tensors]
                )
                for (name, _), total, square in zip(tensors, sums, squares, strict=True):
                    before = found.get(name, (0, 0.0))
                    found[name] = ((before[0] + total) % (1 << 64), before[1] + square)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), BIASED, MOE], ids=["dense", "tied, biases", "experts"])
def test_a_digest_is_its_definition_under_every_layout(options: tuple[str, ...], dtype: torch.dtype) -> None:
    model = small_config(*options).policy.model
    make = random_weights(model, VOCAB_SIZE, seed=3)
    kept: dict[str, Tensor] = {}

    def source(name: str) -> Tensor:
        if name not in kept:
            # Norms and biases are all alike at first; an element's place must count.
            kept[name] = (make(name)[:] + 0.01 * torch.randn(make(name).shape)).to(dtype)
        return kept[name]

    torch.manual_seed(1)
    layouts = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 4, 1, 1), (2, 2, 1, 3)]
    if options == MOE:
        layouts = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2)]
    for layout in layouts:
        found = all_digests(model, source, *layout)
        expected = {
            name: (by_big_integers(name, tensor), float(tensor.double().square().sum()))
            for name, tensor in kept.items()
        }
        assert found.keys() == expected.keys() and len(found) > 10
        for name, (total, square) in expected.items():
            assert found[name][0] == total, (layout, name)
            assert found[name][1] == pytest.approx(square, rel=1e-12), (layout, name)


def test_two_elements_that_change_places_change_the_digest() -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    places = Positions((2, 3), 0, torch.device("cpu"))[:]
    before = digest_shard(values, places, ["w"])
    assert digest_shard(values.flip(1), places, ["w"])[0] != before[0]
    assert digest_shard(values.flip(1), places.flip(1), ["w"]) == before
    assert digest_shard(values, places, ["v"])[0] != before[0]
    # 0.0 and −0.0 are equal numbers and other bits.
    assert digest_shard(-0.0 * values, places, ["w"])[0] != digest_shard(0.0 * values, places, ["w"])[0]


def test_a_digest_ignores_the_split_over_ranks_and_sees_every_value() -> None:
    rollouts = ragged_rollouts()
    rollouts.sample_indices = torch.arange(len(rollouts)) % 4
    whole = digest_rollouts(parallel_of(), rollouts)
    parts = [list(range(0, 5)), list(range(23, 11, -1)), list(range(5, 12))]
    spread = [digest_rollouts(parallel_of(), rollouts.select(part)) for part in parts]
    assert {name: sum(one[name] for one in spread) & MASK for name in whole} == {
        name: value & MASK for name, value in whole.items()
    }

    def changed(name: str, place: int) -> Rollouts:
        column = getattr(rollouts, name).clone()
        column[place] += 1
        return replace(rollouts, **{name: column})

    for name in ("rewards", "response_tokens", "prompt_tokens", "finish_reasons"):
        other = digest_rollouts(parallel_of(), changed(name, 3))
        assert [key for key in whole if other[key] != whole[key]] == [name]
