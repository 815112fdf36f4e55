"""Layouts are inverse pairs, and the table names every tensor that transformers writes, once."""

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


def counted(*shape: int, start: int = 0) -> Tensor:
    """Every element another number."""
    return start + torch.arange(torch.Size(shape).numel()).reshape(shape)


SHARDINGS: dict[str, tuple[Sharding, list[Tensor]]] = {
    "replicated": (Replicated(), [counted(7)]),
    "columns": (Sharded(0), [counted(12, 5)]),
    "rows": (Sharded(1), [counted(5, 12)]),
    "vocabulary 21": (Vocabulary(21), [counted(21, 3)]),
    "vocabulary 24": (Vocabulary(24), [counted(24, 3)]),
    "gate and up": (GateUp(), [counted(12, 5), counted(12, 5, start=1000)]),
    "qkv, one query per group": (
        QueryKeyValue(4, 1, 3),
        [counted(12, 5), counted(12, 5, start=1000), counted(12, 5, start=2000)],
    ),
    "qkv, three queries per group": (
        QueryKeyValue(4, 3, 5),
        [counted(60, 7), counted(20, 7, start=1000), counted(20, 7, start=2000)],
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHARDINGS)
def test_joining_what_was_split_gives_the_tensors_back(name: str, size: int) -> None:
    sharding, tensors = SHARDINGS[name]
    shards = [sharding.split(tensors, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    joined = sharding.join(shards)
    assert len(joined) == len(tensors)
    assert all(torch.equal(got, full) for got, full in zip(joined, tensors, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHARDINGS)
def test_the_partition_dimension_is_the_sharded_one(name: str, size: int) -> None:
    sharding, tensors = SHARDINGS[name]
    whole, shard = sharding.split(tensors, 0, 1), sharding.split(tensors, 0, size)
    expected = list(whole.shape)
    if sharding.partition_dim is not None:
        expected[sharding.partition_dim] = -(-expected[sharding.partition_dim] // size)
    assert list(shard.shape) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("queries_per_group", [1, 3])
def test_a_ranks_query_key_value_rows_stand_where_attention_looks_for_them(
    queries_per_group: int, size: int
) -> None:
    """Index by index: each group's queries, then its key, then its value; whole groups go to a rank."""
    groups, width = 4, 5
    query = counted(groups * queries_per_group * width, 2)
    key, value = counted(groups * width, 2, start=1000), counted(groups * width, 2, start=2000)
    for rank in range(size):
        expected = []
        for group in range(rank * groups // size, (rank + 1) * groups // size):
            for head in range(group * queries_per_group, (group + 1) * queries_per_group):
                expected += [query[head * width + i].tolist() for i in range(width)]
            expected += [key[group * width + i].tolist() for i in range(width)]
            expected += [value[group * width + i].tolist() for i in range(width)]
        shard = QueryKeyValue(groups, queries_per_group, width).split([query, key, value], rank, size)
        assert shard.tolist() == expected


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_has_its_part_of_the_gate_above_its_part_of_up(size: int) -> None:
    gate, up, rows = counted(12, 2), counted(12, 2, start=1000), 12 // size
    for rank in range(size):
        part = slice(rank * rows, (rank + 1) * rows)
        shard = GateUp().split([gate, up], rank, size)
        assert shard.tolist() == gate[part].tolist() + up[part].tolist()


def test_an_odd_vocabulary_is_padded_with_rows_of_zeros_at_its_end() -> None:
    full = counted(21, 2) + 1
    padded = torch.cat([Vocabulary(21).split([full], rank, 4) for rank in range(4)])
    assert padded.shape == (24, 2)
    assert torch.equal(padded[:21], full) and not padded[21:].any()


# ---------------------------------------------------------------------- the table

DENSE = replace(LLAMA, num_layers=8)
TIED = replace(QWEN3, num_layers=8)
EXPERTS = replace(QWEN3_MOE, num_layers=8)


def names_of(table: list[Parameter]) -> list[str]:
    return [name for p in table if not p.tied_duplicate for rank in p.tensors for name, _ in rank]


@pytest.mark.parametrize("model", [DENSE, TIED, EXPERTS], ids=["dense", "tied", "experts"])
@pytest.mark.parametrize(
    ("pipeline", "virtual", "ep_size"), [(1, 1, 1), (2, 1, 2), (4, 1, 4), (2, 2, 1), (4, 2, 2)]
)
def test_every_tensor_is_in_the_table_once_under_every_layout(
    model: ModelConfig, pipeline: int, virtual: int, ep_size: int
) -> None:
    if model.num_moe_experts is None:
        ep_size = 1
    table = parameters(model, VOCAB_SIZE, Stages(8, pipeline, virtual), ep_size)
    names = names_of(table)
    assert len(names) == len(set(names))
    assert set(names) == set(hf_shapes(model, VOCAB_SIZE))
    places = [(p.stage, p.chunk, p.mcore_name) for p in table]
    assert len(places) == len(set(places))
    for p in table:
        assert len(p.tensors) == (ep_size if p.is_expert else 1)
        shapes = [tuple(shape for _, shape in rank) for rank in p.tensors]
        assert len(set(shapes)) == 1  # one Megatron parameter has one shape on all ranks


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (2, 2), (4, 2), (2, 4)])
def test_layers_are_assigned_to_stages_chunk_by_chunk(pipeline: int, virtual: int) -> None:
    """Walking chunk by chunk, and within a chunk stage by stage, meets the layers in order."""
    stages = Stages(8, pipeline, virtual)
    per_chunk = 8 // (pipeline * virtual)
    walk = [(s, c, i) for c, s, i in product(range(virtual), range(pipeline), range(per_chunk))]
    assert [stages.place(layer) for layer in range(8)] == walk


def test_each_layers_tensors_stand_on_the_layers_own_stage() -> None:
    stages = Stages(8, 2, 2)
    for p in parameters(EXPERTS, VOCAB_SIZE, stages, ep_size=2):
        for name, _ in (pair for rank in p.tensors for pair in rank):
            if name.startswith("model.layers."):
                stage, chunk, local = stages.place(int(name.split(".")[2]))
                assert (p.stage, p.chunk) == (stage, chunk)
                assert p.mcore_name.startswith(f"decoder.layers.{local}.")


def test_experts_are_assigned_in_blocks_to_expert_parallel_ranks() -> None:
    table = parameters(replace(EXPERTS, num_moe_experts=6), VOCAB_SIZE, Stages(8), ep_size=2)
    held = {
        p.mcore_name.split(".")[6]: [rank[0][0].split(".")[5] for rank in p.tensors]
        for p in table
        if p.mcore_name.startswith("decoder.layers.0.") and p.mcore_name.endswith("linear_fc2.weight")
    }
    assert held == {"0": ["0", "3"], "1": ["1", "4"], "2": ["2", "5"]}


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_tied_output_is_the_embedding_and_a_copy_of_it_on_another_stage(pipeline: int) -> None:
    table = parameters(TIED, VOCAB_SIZE, Stages(8, pipeline))
    outputs = [p for p in table if p.mcore_name == "output_layer.weight"]
    assert [(p.stage, p.tied_duplicate, p.tensors[0][0][0]) for p in outputs] == (
        [] if pipeline == 1 else [(1, True, "model.embed_tokens.weight")]
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_split_and_joined_without_loss(family: str, size: int) -> None:
    model = replace(FAMILIES[family], num_attention_heads=8, num_query_groups=4)
    source = random_weights(model, VOCAB_SIZE, seed=0)
    for p in parameters(model, VOCAB_SIZE, Stages(model.num_layers)):
        tensors = [source(name) for name, _ in p.tensors[0]]
        assert [tuple(t.shape) for t in tensors] == [shape for _, shape in p.tensors[0]]
        joined = p.sharding.join([p.sharding.split(tensors, rank, size) for rank in range(size)])
        assert all(torch.equal(got, full) for got, full in zip(joined, tensors, strict=True))
        assert p.numel == sum(t.numel() for t in tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_that_transformers_saves(family: str, tmp_path: Path) -> None:
    """What lies in a checkpoint: in memory transformers fuses experts, and a tied head is there twice."""
    transformers_model(family).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert hf_shapes(FAMILIES[family], VOCAB_SIZE) == written


# ---------------------------------------------------------------------- random weights


def test_random_weights_follow_name_and_seed_only() -> None:
    first, again = (random_weights(QWEN3, VOCAB_SIZE, seed=1) for _ in range(2))
    names = [name for name, shape in hf_shapes(QWEN3, VOCAB_SIZE).items() if len(shape) == 2]
    assert all(torch.equal(first(name), again(name)) for name in reversed(names))
    values = {float(random_weights(QWEN3, VOCAB_SIZE, seed)(name)[0, 0]) for name in names for seed in (1, 2)}
    assert len(values) == 2 * len(names)


def test_random_weights_have_the_documented_spread() -> None:
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
