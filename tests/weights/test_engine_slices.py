"""Slices for SGLang's ranks: their content under every layout, who feeds whom, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opo_megatron.config.choices import Scales
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.weights.engine_slices import (
    EngineSizes,
    PolicySizes,
    check_slices,
    engine_tensors,
    expected_tensors,
    slice_infos,
)
from opo_megatron.weights.fp8_folder import BlockFp8
from opo_megatron.weights.param_mapping import Stages, parameters
from opo_megatron.weights.random_init import random_weights
from opo_megatron.weights.safetensors_file import TensorInfo
from opo_megatron.weights.slice_routes import Place, SliceRoutes, routes_of
from opo_megatron.weights.stream import shard_shape
from tests.support.engine_slices import held_by
from tests.support.fixtures import small_config
from tests.support.paths import WORKERS
from tests.support.requirements import run_ranks_of
from tests.support.slice_cases import EP2, ETP1, FAMILIES, PP2, TP2, TP4, VPP2, model_overrides

WORKER = WORKERS / "slice_stream_worker.py"
VOCABULARIES = {100: "rows of the policy and of the engine have other boundaries", 128: "the same"}


def model_of(family: str) -> ModelConfig:
    return small_config(*model_overrides(FAMILIES[family])).policy.model


# ---------------------------------------------------------------------- content


@pytest.mark.parametrize("engine", [1, 2, 4])
@pytest.mark.parametrize("policy", [1, 2])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("family", ["llama, tied", "qwen2", "qwen3_moe"])
def test_a_slice_cut_out_of_shards_is_what_the_engines_rank_holds(
    family: str, vocab: int, policy: int, engine: int
) -> None:
    """Engine of 4: both of its key heads have two copies."""
    model, sizes = model_of(family), EngineSizes(engine)
    source = random_weights(model, vocab, 1)
    held = [held_by(model, vocab, source, rank, engine) for rank in range(engine)]
    mapping = parameters(model, vocab, Stages(4), 1, -(-vocab // policy) * policy)
    for tensor in engine_tensors(mapping):
        cut = tensor.cut(PolicySizes(policy, policy), sizes)
        for rank in range(engine):
            slices = []
            for parameter in tensor.parameters:
                full = [source(name) for name, _ in parameter.tensors[0]]
                shards = [parameter.sharding.split(full, r, policy) for r in range(policy)]
                sources = cut.sources(rank) or range(1)
                rows = cut.rows([cut.piece(shards[r], rank) for r in sources], rank)
                slices.append(torch.cat(rows))
            found = torch.stack(slices) if tensor.is_expert else slices[0]
            assert torch.equal(found, held[rank][tensor.name]), (tensor.name, rank)


def test_two_ranks_of_every_kind_stream_each_engines_slices() -> None:
    """Tensor-parallel ranks, stages, and ranks with half of the experts each."""
    cases = (f"1,1,fp8:{TP2}", f"2,1,fp8:{PP2},{VPP2}", f"2,2,bf16:{TP2},{EP2},{ETP1}")
    run_ranks_of(WORKER, 2, "qwen3_moe in blocks", "100", *cases)


ENGINES = [
    f"{tensor},{expert},{kind}" for tensor, expert in ((1, 1), (2, 1), (2, 2)) for kind in ("bf16", "fp8")
]
DENSE = {1: [""], 2: [TP2, PP2, ""], 4: [TP2, f"{TP2},{PP2}", f"{PP2},{VPP2}"]}
SPARSE = {
    1: [""],
    2: [TP2, EP2],
    4: [f"{TP2},{EP2},{ETP1}", f"{EP2},{PP2}", f"{TP2},{EP2},{ETP1},{PP2}", TP2],
}


@pytest.mark.slow
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "family", ["llama in blocks", "llama, tied", "qwen2", "qwen3_moe", "qwen3_moe in blocks"]
)
def test_every_layout_streams_every_engines_slices(family: str, ranks: int, vocab: int) -> None:
    is_dense, in_blocks = "moe" not in family, "blocks" in family
    engines = [e for e in ENGINES if (in_blocks or "bf16" in e) and not (is_dense and "2,2" in e)]
    layouts = (DENSE if is_dense else SPARSE)[ranks]
    cases = [f"{engine}:{layout}" for engine in engines for layout in layouts]
    if family == "qwen2":
        cases += [f"4,1,bf16:{layout}" for layout in layouts]  # two copies of each key head
    run_ranks_of(WORKER, ranks, family, str(vocab), *cases)


@pytest.mark.slow
def test_four_tensor_parallel_ranks_feed_two_engine_ranks() -> None:
    groups = "policy.model.num_query_groups=4"
    cases = [f"{engine},1,bf16:{TP4},{groups}" for engine in (1, 2, 4)]
    run_ranks_of(WORKER, 4, "llama", "100", *cases)
    run_ranks_of(WORKER, 4, "qwen3_moe", "128", *cases)


# ---------------------------------------------------------------------- what is checked before sending

DTYPE = torch.bfloat16
QKV, NORM = "model.layers.0.self_attn.qkv_proj.weight", "model.norm.weight"


def replaced(of: str, /, **fields: object) -> list[TensorInfo]:
    infos = expected_tensors(model_of("qwen2"), 100, EngineSizes(2), DTYPE)
    return [replace(info, **fields) if info.name == of else info for info in infos]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (replaced(NORM, name="model.norm.bias"), "which have no tensor model.norm.bias; set rollout.sglang."),
        (replaced(NORM, name=QKV), f"which would be sent {QKV} twice"),
        (replaced(QKV, shape=(128, 64)), f"whose {QKV} is [64, 64], not [128, 64]"),
        (replaced(NORM, shape=(1, 64)), f"whose {NORM} is [64], not [1, 64]"),
        (replaced(NORM, dtype=torch.float32), f"whose {NORM} has type bfloat16, not float32"),
        (replaced(QKV, dtype=torch.float8_e4m3fn), f"whose {QKV} has type bfloat16, not float8_e4m3fn"),
        (replaced(NORM)[:-2], f"which would not be sent {NORM}"),
        ([info for info in replaced(NORM) if "bias" not in info.name], "qkv_proj.bias"),
    ],
)  # fmt: skip
def test_what_the_engine_does_not_have_is_refused_before_sending(sent: list[TensorInfo], words: str) -> None:
    expected = expected_tensors(model_of("qwen2"), 100, EngineSizes(2), DTYPE)
    with pytest.raises(UserError) as error:
        check_slices(sent, expected)
    assert words in str(error.value) and str(error.value).endswith("; set rollout.sglang.layout=full")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("policy", "engine"), [(1, 1), (1, 2), (2, 1), (2, 2), (2, 4)])
def test_what_is_sent_is_what_the_engine_has(family: str, policy: int, engine: int) -> None:
    model = model_of(family)
    fp8 = BlockFp8(replace(model, vocab_size=100), Scales.fp32) if "blocks" in family and engine < 4 else None
    sizes, shards = EngineSizes(engine, fp8=fp8), PolicySizes(policy, policy)
    mapping = parameters(model, 100, Stages(4, 2, 2), 1, 100)
    sent = [
        info
        for tensor in engine_tensors(mapping)
        for info in slice_infos(tensor, shard_shape(tensor.parameters[0], policy), DTYPE, shards, sizes)
    ]
    check_slices(sent, expected_tensors(model, 100, sizes, DTYPE))


# ---------------------------------------------------------------------- routes


def places(nodes: int, on_node: int, policy: int, sharing: int, stages: int = 1) -> list[Place]:
    ranks = nodes * on_node
    return [
        Place(str(r // on_node), r - r % sharing, r % policy, r % (ranks // stages) // policy)
        for r in range(ranks)
    ]


@pytest.mark.parametrize(
    ("given", "policy", "engine", "wanted"),
    [
        (places(1, 1, 1, 1), 1, 2, [(0, 1)]),
        (places(1, 2, 2, 2), 2, 2, [(0,), (1,)]),
        (places(1, 4, 4, 4), 4, 2, [(0,), (), (1,), ()]),
        (places(1, 4, 4, 2), 4, 2, [(0,), (), (1,), (1,)]),  # two engines, both fed by the whole node
        (places(1, 4, 1, 4), 1, 4, [(0,), (1,), (2,), (3,)]),  # data-parallel ranks share the work
        (places(1, 4, 2, 4), 2, 4, [(0,), (2,), (1,), (3,)]),
        (places(2, 2, 2, 2, stages=2), 2, 2, [(0,), (1,), (0,), (1,)]),
        (places(1, 4, 2, 4, stages=2), 2, 2, [(0,), (1,), (0,), (1,)]),
        (places(1, 2, 1, 2, stages=2), 1, 2, [(0, 1), (0, 1)]),
        (places(2, 2, 4, 2), 4, 4, None),  # an engine's other half would be on the other node
        (places(2, 2, 4, 2), 4, 2, None),
    ],
)  # fmt: skip
def test_an_engine_rank_is_fed_once_by_a_rank_of_its_node_with_its_slice(
    given: list[Place], policy: int, engine: int, wanted: list[tuple[int, ...]] | None
) -> None:
    routes = routes_of(given, policy, EngineSizes(engine))
    if wanted is None:
        assert isinstance(routes, str) and "do not hold what rank" in routes
        return
    assert isinstance(routes, SliceRoutes)
    fed = sorted(feed for feeds in routes.feeds for feed in feeds)
    assert fed == sorted((o, r) for o in {place.engine for place in given} for r in range(engine))
    for place, feeds, own in zip(given, routes.feeds, routes.wanted, strict=True):
        assert all(given[owner].node == place.node and rank in own for owner, rank in feeds)
    assert list(routes.wanted) == wanted
