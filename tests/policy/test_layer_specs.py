"""Names of the parameter mapping in both of Megatron's layer specs.

The local spec's names are those of a built model.  The other spec needs no Transformer Engine: Megatron's
provider gives the class of every submodule, and attribute names are the fields of the submodules, so
parameter names follow from the provider's tree.  The parameter names within such a class are those that
Megatron itself reads: `layer_norm_weight` next to `weight` where a norm is fused, and `weight0, weight1, …`
in grouped experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from opo_megatron.config.schema import ModelConfig
from opo_megatron.weights.param_mapping import Parameter, Stages, hf_shapes, parameters
from tests.support.hf_models import FAMILIES, VOCAB_SIZE

EXPERTS_PER_RANK = 2


def names_of_class(kind: type, path: str, model: ModelConfig) -> list[str]:
    """Parameter names of a class of Transformer Engine's provider at a path in the layer."""
    has_bias = model.add_qkv_bias and path.endswith("linear_qkv")
    names = {
        "TENorm": ["weight"],
        "_TENormWithResidual": ["weight"],
        "TELayerNormColumnParallelLinear": ["layer_norm_weight", "weight"],
        "TEColumnParallelLinear": ["weight"],
        "TERowParallelLinear": ["weight"],
        "TEColumnParallelGroupedLinear": [f"weight{j}" for j in range(EXPERTS_PER_RANK)],
        "TERowParallelGroupedLinear": [f"weight{j}" for j in range(EXPERTS_PER_RANK)],
    }.get(kind.__name__, [])
    return names + ["bias"] * has_bias


def built_by(spec: ModuleSpec | partial[Any]) -> tuple[str, Any]:
    """The name of the class that a spec builds, and its submodules."""
    if isinstance(spec, ModuleSpec):
        return spec.module.__name__, spec.submodules
    kind = getattr(spec.func, "__self__", spec.func)  # a class, or one of its class methods
    return kind.__name__, spec.keywords["submodules"]


def walk(spec: Any, path: str, model: ModelConfig) -> Iterator[str]:
    if isinstance(spec, (ModuleSpec, partial)):
        kind, submodules = built_by(spec)
        if kind == "MoELayer":
            yield f"{path}.router.weight"
        if "shared_expert" in path:  # built only for models with shared experts
            return
        yield from walk(submodules, path, model)
    elif is_dataclass(spec):
        for field in fields(spec):
            yield from walk(getattr(spec, field.name), f"{path}.{field.name}".lstrip("."), model)
    elif isinstance(spec, type) and spec is not IdentityOp:
        yield from (f"{path}.{name}" for name in names_of_class(spec, path, model))


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's provider, with stubs of the same names for the classes that need Transformer Engine."""
    from megatron.core.extensions import transformer_engine_spec_provider as module

    for name in [name for name in vars(module) if name.startswith("TE") and name != "TESpecProvider"]:
        if name != "TEGroupedMLP":
            monkeypatch.setattr(module, name, type(name, (), {}))
    monkeypatch.setattr(module, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", module.TESpecProvider, raising=False)


def mapping_of(model: ModelConfig, ep_size: int = 1) -> list[Parameter]:
    stages = Stages(model.num_layers)
    return parameters(model, VOCAB_SIZE, stages, ep_size, spec="transformer_engine")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_engine_names_equal_those_of_megatrons_spec(family: str, provider: None) -> None:
    model = FAMILIES[family]
    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.num_moe_experts, moe_grouped_gemm=True, qk_layernorm=model.qk_layernorm
    )
    ep_size = 1 if model.num_moe_experts is None else model.num_moe_experts // EXPERTS_PER_RANK
    prefix = "decoder.layers.1."
    ours = [p.mcore_name for p in mapping_of(model, ep_size) if p.mcore_name.startswith(prefix)]
    assert sorted(ours) == sorted(prefix + name for name in walk(spec, "", model))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformer_engine_names_map_every_tensor_once(family: str) -> None:
    model = replace(FAMILIES[family], num_layers=4)
    for ep_size in (1,) if model.num_moe_experts is None else (1, 2, 4):
        mapping = mapping_of(model, ep_size)
        names = [name for p in mapping for rank in p.tensors for name, _ in rank]
        assert len(names) == len(set(names))
        assert set(names) == set(hf_shapes(model, VOCAB_SIZE))
        assert len({p.mcore_name for p in mapping}) == len(mapping)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_specs_shard_the_same_tensors_the_same_way(family: str) -> None:
    model = FAMILIES[family]
    local = parameters(model, VOCAB_SIZE, Stages(model.num_layers))
    assert [(p.tensors, p.sharding, p.stage) for p in local] == [
        (p.tensors, p.sharding, p.stage) for p in mapping_of(model)
    ]
