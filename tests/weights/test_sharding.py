"""Split and join of a sharding are inverse, and the mapping has every tensor of transformers exactly once."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.weights.param_mapping import Parameter, Stages, hf_shapes, parameters
from opo_megatron.weights.random_init import random_weights
from opo_megatron.weights.sharding import GateUp, QueryKeyValue, Replicated, Sharded, Sharding, Vocabulary
from tests.support.hf_models import FAMILIES, LLAMA, QWEN3, QWEN3_MOE, VOCAB_SIZE, transformers_model

SIZES = [1, 2, 4]


def distinct(*shape: int, start: int = 0) -> Tensor:
    """A tensor of distinct elements."""
    return start + torch.arange(torch.Size(shape).numel()).reshape(shape)


SHARDINGS: dict[str, tuple[Sharding, list[Tensor]]] = {
    "replicated": (Replicated(), [distinct(7)]),
    "columns": (Sharded(0), [distinct(12, 5)]),
    "rows": (Sharded(1), [distinct(5, 12)]),
    "vocabulary 21": (Vocabulary(21), [distinct(21, 3)]),
    "vocabulary 24": (Vocabulary(24), [distinct(24, 3)]),
    "gate and up": (GateUp(), [distinct(12, 5), distinct(12, 5, start=1000)]),
    "qkv, one query per group": (
        QueryKeyValue(4, 1, 3),
        [distinct(12, 5), distinct(12, 5, start=1000), distinct(12, 5, start=2000)],
    ),
    "qkv, three queries per group": (
        QueryKeyValue(4, 3, 5),
        [distinct(60, 7), distinct(20, 7, start=1000), distinct(20, 7, start=2000)],
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHARDINGS)
def test_join_inverts_split(name: str, size: int) -> None:
    sharding, tensors = SHARDINGS[name]
    shards = [sharding.split(tensors, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    joined = sharding.join(shards)
    assert len(joined) == len(tensors)
    assert all(torch.equal(actual, full) for actual, full in zip(joined, tensors, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHARDINGS)
def test_the_partition_dimension_is_the_sharded_one(name: str, size: int) -> None:
    sharding, tensors = SHARDINGS[name]
    full, shard = sharding.split(tensors, 0, 1), sharding.split(tensors, 0, size)
    expected = list(full.shape)
    if sharding.partition_dim is not None:
        expected[sharding.partition_dim] = -(-expected[sharding.partition_dim] // size)
    assert list(shard.shape) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("queries_per_group", [1, 3])
def test_qkv_rows_of_a_rank_are_in_the_order_of_megatrons_attention(
    queries_per_group: int, size: int
) -> None:
    """Row by row: each group's queries, then its key, then its value; a rank holds whole groups."""
    groups, head_dim = 4, 5
    query = distinct(groups * queries_per_group * head_dim, 2)
    key, value = distinct(groups * head_dim, 2, start=1000), distinct(groups * head_dim, 2, start=2000)
    for rank in range(size):
        expected = []
        for group in range(rank * groups // size, (rank + 1) * groups // size):
            for head in range(group * queries_per_group, (group + 1) * queries_per_group):
                expected += [query[head * head_dim + i].tolist() for i in range(head_dim)]
            expected += [key[group * head_dim + i].tolist() for i in range(head_dim)]
            expected += [value[group * head_dim + i].tolist() for i in range(head_dim)]
        shard = QueryKeyValue(groups, queries_per_group, head_dim).split([query, key, value], rank, size)
        assert shard.tolist() == expected


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_has_its_gate_rows_above_its_up_rows(size: int) -> None:
    gate, up, rows = distinct(12, 2), distinct(12, 2, start=1000), 12 // size
    for rank in range(size):
        part = slice(rank * rows, (rank + 1) * rows)
        shard = GateUp().split([gate, up], rank, size)
        assert shard.tolist() == gate[part].tolist() + up[part].tolist()


def test_an_indivisible_vocabulary_is_padded_with_zero_rows() -> None:
    full = distinct(21, 2) + 1
    padded = torch.cat([Vocabulary(21).split([full], rank, 4) for rank in range(4)])
    assert padded.shape == (24, 2)
    assert torch.equal(padded[:21], full) and not padded[21:].any()


# ---------------------------------------------------------------------- the parameter mapping

DENSE = replace(LLAMA, num_layers=8)
TIED = replace(QWEN3, num_layers=8)
EXPERTS = replace(QWEN3_MOE, num_layers=8)


def names_of(mapping: list[Parameter]) -> list[str]:
    return [name for p in mapping if not p.tied_duplicate for rank in p.tensors for name, _ in rank]


@pytest.mark.parametrize("model", [DENSE, TIED, EXPERTS], ids=["dense", "tied", "experts"])
@pytest.mark.parametrize(
    ("pipeline", "virtual", "ep_size"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 1), (4, 2, 2)]
)
def test_every_tensor_is_mapped_once_under_every_layout(
    model: ModelConfig, pipeline: int, virtual: int, ep_size: int
) -> None:
    if model.num_moe_experts is None:
        ep_size = 1
    mapping = parameters(model, VOCAB_SIZE, Stages(8, pipeline, virtual), ep_size)
    names = names_of(mapping)
    assert len(names) == len(set(names))
    assert set(names) == set(hf_shapes(model, VOCAB_SIZE))
    positions = [(p.stage, p.chunk, p.mcore_name) for p in mapping]
    assert len(positions) == len(set(positions))
    for p in mapping:
        assert len(p.tensors) == (ep_size if p.is_expert else 1)
        shapes = [tuple(shape for _, shape in rank) for rank in p.tensors]
        assert len(set(shapes)) == 1  # a Megatron parameter has the same shape on all ranks


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (2, 2), (4, 2), (2, 4)])
def test_layers_are_assigned_to_stages_chunk_by_chunk(pipeline: int, virtual: int) -> None:
    """Traversed chunk by chunk, and stage by stage within a chunk, the layers are in order."""
    stages = Stages(8, pipeline, virtual)
    per_chunk = 8 // (pipeline * virtual)
    expected = [(s, c, i) for c, s, i in product(range(virtual), range(pipeline), range(per_chunk))]
    assert [stages.place(layer) for layer in range(8)] == expected


def test_each_layers_tensors_are_on_the_layers_stage() -> None:
    stages = Stages(8, 2, 2)
    for p in parameters(EXPERTS, VOCAB_SIZE, stages, ep_size=2):
        for name, _ in (pair for rank in p.tensors for pair in rank):
            if name.startswith("model.layers."):
                stage, chunk, local = stages.place(int(name.split(".")[2]))
                assert (p.stage, p.chunk) == (stage, chunk)
                assert p.mcore_name.startswith(f"decoder.layers.{local}.")


def test_experts_are_assigned_in_blocks_to_expert_parallel_ranks() -> None:
    mapping = parameters(replace(EXPERTS, num_moe_experts=6), VOCAB_SIZE, Stages(8), ep_size=2)
    experts = {
        p.mcore_name.split(".")[6]: [rank[0][0].split(".")[5] for rank in p.tensors]
        for p in mapping
        if p.mcore_name.startswith("decoder.layers.0.") and p.mcore_name.endswith("linear_fc2.weight")
    }
    assert experts == {"0": ["0", "3"], "1": ["1", "4"], "2": ["2", "5"]}


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_tied_output_is_a_duplicate_embedding_on_the_last_stage(pipeline: int) -> None:
    mapping = parameters(TIED, VOCAB_SIZE, Stages(8, pipeline))
    outputs = [p for p in mapping if p.mcore_name == "output_layer.weight"]
    assert [(p.stage, p.tied_duplicate, p.tensors[0][0][0]) for p in outputs] == (
        [] if pipeline == 1 else [(1, True, "model.embed_tokens.weight")]
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_split_and_joined_losslessly(family: str, size: int) -> None:
    model = replace(FAMILIES[family], num_attention_heads=8, num_query_groups=4)
    source = random_weights(model, VOCAB_SIZE, seed=0)
    for p in parameters(model, VOCAB_SIZE, Stages(model.num_layers)):
        tensors = [source(name) for name, _ in p.tensors[0]]
        assert [tuple(t.shape) for t in tensors] == [shape for _, shape in p.tensors[0]]
        joined = p.sharding.join([p.sharding.split(tensors, rank, size) for rank in range(size)])
        assert all(torch.equal(actual, full) for actual, full in zip(joined, tensors, strict=True))
        assert p.numel == sum(t.numel() for t in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_equal_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    """Against a saved file: in memory transformers fuses experts and has a tied head twice."""
    transformers_model(family).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_shapes(FAMILIES[family], VOCAB_SIZE) == saved


# ---------------------------------------------------------------------- random weights


def test_random_weights_depend_on_name_and_seed_only() -> None:
    first, repeated = (random_weights(QWEN3, VOCAB_SIZE, seed=1) for _ in range(2))
    names = [name for name, shape in hf_shapes(QWEN3, VOCAB_SIZE).items() if len(shape) == 2]
    assert all(torch.equal(first(name), repeated(name)) for name in reversed(names))
    values = {float(random_weights(QWEN3, VOCAB_SIZE, seed)(name)[0, 0]) for name in names for seed in (1, 2)}
    assert len(values) == 2 * len(names)


def test_random_weights_have_the_documented_standard_deviation() -> None:
    model = replace(LLAMA, hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, kv_channels=64)
    model = replace(model, num_query_groups=8, num_layers=3)
    source = random_weights(model, 500, seed=1)
    shrink = (2 * model.num_layers) ** -0.5
    for name, std in (
        ("model.embed_tokens.weight", 0.02),
        ("lm_head.weight", 256**-0.5),
        ("model.layers.2.self_attn.q_proj.weight", 256**-0.5),
        ("model.layers.2.self_attn.o_proj.weight", 512**-0.5 * shrink),
        ("model.layers.2.mlp.up_proj.weight", 256**-0.5),
        ("model.layers.2.mlp.down_proj.weight", 512**-0.5 * shrink),
    ):
        assert float(source(name).std()) == pytest.approx(std, rel=0.01)
    assert bool((source("model.norm.weight") == 1).all())
