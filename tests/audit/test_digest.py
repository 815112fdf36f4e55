"""Digests of weights and rollouts: definition, sharding, and sensitivity to every element."""

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


def reference_digest(name: str, tensor: Tensor) -> int:
    """Reference implementation: the definition, element by element."""
    bits = tensor.flatten().view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).tolist()
    seed = hash_of_text(name) & MASK
    return sum(mix((value * FACTORS[0] ^ (i + 1) * GOLDEN ^ seed) & MASK) for i, value in enumerate(bits)) % (
        1 << 64
    )


def all_digests(
    model: ModelConfig, source: Callable[[str], Tensor], tp: int, pp: int, ep: int, dp: int
) -> dict[str, tuple[int, float]]:
    """The digests of all ranks of a parallel layout, summed."""
    padded = -(-VOCAB_SIZE // tp) * tp + 2 * tp
    mapping = parameters(model, VOCAB_SIZE, Stages(model.num_layers, pp), ep, padded)
    digests: dict[str, tuple[int, float]] = {}
    for rank in range(tp * pp * dp):
        tp_rank, dp_rank, pp_rank = rank % tp, rank // tp % dp, rank // tp // dp
        ep_rank = rank % (tp * dp) % ep if ep > 1 else 0
        parallel = parallel_of(
            tp_rank=tp_rank, tp_size=tp, pp_rank=pp_rank, pp_size=pp, dp_cp_rank=dp_rank, dp_cp_size=dp,
            ep_rank=ep_rank, ep_size=ep, edp_rank=rank % (tp * dp) // ep if ep > 1 else dp_rank,
            etp_rank=0 if ep > 1 else tp_rank, etp_size=1 if ep > 1 else tp,
        )  # fmt: skip
        for order, parameter in enumerate(mapping):
            if owns_digest(parameter, parallel, order):
                tensors = parameter.tensors[ep_rank if parameter.is_expert else 0]
                positions_of = {
                    name: Positions(shape, label, parallel.device)
                    for label, (name, shape) in enumerate(tensors)
                }
                positions = read_shard(parameter, parallel, positions_of.__getitem__)
                sums, squares = digest_shard(
                    read_shard(parameter, parallel, source), positions, [name for name, _ in tensors]
                )
                for (name, _), total, square in zip(tensors, sums, squares, strict=True):
                    before = digests.get(name, (0, 0.0))
                    digests[name] = ((before[0] + total) % (1 << 64), before[1] + square)
    return digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), BIASED, MOE], ids=["dense", "tied, biases", "experts"])
def test_a_digest_equals_its_definition_under_every_layout(
    options: tuple[str, ...], dtype: torch.dtype
) -> None:
    model = small_config(*options).policy.model
    make = random_weights(model, VOCAB_SIZE, seed=3)
    cached: dict[str, Tensor] = {}

    def source(name: str) -> Tensor:
        if name not in cached:
            # Norms and biases start constant; the digest must depend on an element's position.
            cached[name] = (make(name)[:] + 0.01 * torch.randn(make(name).shape)).to(dtype)
        return cached[name]

    torch.manual_seed(1)
    layouts = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 4, 1, 1), (2, 2, 1, 3)]
    if options == MOE:
        layouts = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2)]
    for layout in layouts:
        digests = all_digests(model, source, *layout)
        expected = {
            name: (reference_digest(name, tensor), float(tensor.double().square().sum()))
            for name, tensor in cached.items()
        }
        assert digests.keys() == expected.keys() and len(digests) > 10
        for name, (total, square) in expected.items():
            assert digests[name][0] == total, (layout, name)
            assert digests[name][1] == pytest.approx(square, rel=1e-12), (layout, name)


def test_swapping_two_elements_changes_the_digest() -> None:
    values = torch.arange(6, dtype=torch.float32).view(2, 3)
    positions = Positions((2, 3), 0, torch.device("cpu"))[:]
    before = digest_shard(values, positions, ["w"])
    assert digest_shard(values.flip(1), positions, ["w"])[0] != before[0]
    assert digest_shard(values.flip(1), positions.flip(1), ["w"]) == before
    assert digest_shard(values, positions, ["v"])[0] != before[0]
    # 0.0 and −0.0 are equal but differ in their bits.
    assert digest_shard(-0.0 * values, positions, ["w"])[0] != digest_shard(0.0 * values, positions, ["w"])[0]


def test_a_digest_ignores_the_split_over_ranks_and_covers_every_value() -> None:
    rollouts = ragged_rollouts()
    rollouts.sample_indices = torch.arange(len(rollouts)) % 4
    whole = digest_rollouts(parallel_of(), rollouts)
    parts = [list(range(0, 5)), list(range(23, 11, -1)), list(range(5, 12))]
    per_rank = [digest_rollouts(parallel_of(), rollouts.select(part)) for part in parts]
    assert {name: sum(part[name] for part in per_rank) & MASK for name in whole} == {
        name: value & MASK for name, value in whole.items()
    }

    def changed(name: str, index: int) -> Rollouts:
        column = getattr(rollouts, name).clone()
        column[index] += 1
        return replace(rollouts, **{name: column})

    for name in ("rewards", "response_tokens", "prompt_tokens", "finish_reasons"):
        other = digest_rollouts(parallel_of(), changed(name, 3))
        assert [key for key in whole if other[key] != whole[key]] == [name]
