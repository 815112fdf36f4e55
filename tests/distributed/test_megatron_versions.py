"""What differs between the versions of Megatron-Core; another difference of a new version fails here."""

from __future__ import annotations

import ast
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import optimizer
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from opo_megatron.checkpoint import torch_dist
from opo_megatron.distributed import megatron_versions
from opo_megatron.distributed.megatron_versions import (
    IDENTITY,
    RATES,
    adopt_rates,
    groups_in,
    mlp_of_class,
    mlp_submodules,
    reads_common_file_only,
    unreadable_reason,
)
from opo_megatron.environment.versions import read_versions
from opo_megatron.policy.adam import GroupStepAdam


def test_the_installed_version_is_that_of_this_python() -> None:
    assert version("megatron-core") == read_versions().part("megatron-core").version


def test_the_mlp_of_a_spec_can_be_changed_and_replaced() -> None:
    class OwnMLP(MLP):  # type: ignore[misc]
        pass

    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    submodules = mlp_submodules(spec.mlp)
    assert isinstance(submodules, MLPSubmodules)
    replaced = mlp_of_class(OwnMLP, submodules)
    assert type(replaced) is type(spec.mlp) and mlp_submodules(replaced) is submodules


def test_megatron_finds_a_parameter_group_by_known_keys_only() -> None:
    """`optimizer` names another optimizer for a group, which is never set here."""
    for module in (megatron_optimizer, distrib_optimizer):
        assert set(IDENTITY) <= set(module.param_group_identifier_keys) <= {*IDENTITY, *RATES, "optimizer"}


def group(lr: float | None, wd_mult: float = 1.0, is_expert: bool = False, **more: Any) -> dict[str, Any]:
    same = {"wd_mult": wd_mult, "lr_mult": 1.0, "is_expert_parallel": is_expert, "is_decoupled_lr": False}
    return {"params": [], "max_lr": lr, "min_lr": None, **same, **more}


def without(name: str, group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}


@pytest.mark.parametrize(
    ("saved", "current", "rates"),
    [
        ([group(1e-3)], [group(3e-4)], [3e-4]),
        ([group(1e-3)], [group(1e-3)], [1e-3]),
        ([group(1e-3, 0.0), group(1e-3, 1.0)], [group(3e-4, 1.0), group(3e-4, 0.0)], [3e-4, 3e-4]),
        ([group(1e-3), group(1e-2)], [group(5e-3), group(5e-4)], [5e-4, 5e-3]),
        ([group(1e-2), group(1e-3)], [group(5e-3), group(5e-4)], [5e-3, 5e-4]),
        ([group(1e-3), group(1e-3, is_expert=True)], [group(7.0, is_expert=True), group(2.0)], [2.0, 7.0]),
        ([without("max_lr", group(0.0))], [group(3e-4)], [3e-4]),
        ([group(1e-3)], [without("max_lr", group(0.0))], [None]),
        ([group(None), group(1e-3)], [group(2e-3), group(None)], [None, 2e-3]),
    ],
)
def test_saved_groups_take_this_runs_rates_and_stay_apart(
    saved: list[dict[str, Any]], current: list[dict[str, Any]], rates: list[float | None]
) -> None:
    for number, one in enumerate(saved):
        one["step"] = number
    adopt_rates(saved, current)
    assert [one.get("max_lr") for one in saved] == rates
    assert [one["step"] for one in saved] == list(range(len(saved)))
    keys = megatron_optimizer.param_group_identifier_keys
    found = {tuple(one.get(key) for key in keys) for one in saved}
    assert found == {tuple(one.get(key) for key in keys) for one in current}


@pytest.mark.parametrize(
    ("saved", "current"),
    [
        ([group(1e-3)], [group(1e-3), group(1e-3, 0.0)]),
        ([group(1e-3), group(1e-3, 0.0)], [group(1e-3)]),
        ([group(1e-3, 0.0)], [group(1e-3)]),
        ([group(1e-3)], [group(1e-3, is_expert=True)]),
        ([], [group(1e-3)]),
    ],
)
def test_other_groups_than_this_runs_are_refused(
    saved: list[dict[str, Any]], current: list[dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="other parameter groups"):
        adopt_rates(saved, current)


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"param_groups": ["a", "b"]}, "ab"),
        ({"optimizer": {"state": {0: {}}, "param_groups": ["a"]}, "param_state": {}}, "a"),
        ({0: {"optimizer": {"param_groups": ["a"]}}, 1: {"optimizer": {"param_groups": ["b"]}}}, "ab"),
        ({"optimizer": {"state": {}}}, ""),
        ({}, ""),
    ],
)
def test_parameter_groups_are_found_in_every_kind_of_state(state: dict[Any, Any], names: str) -> None:
    assert "".join(map(str, groups_in(state))) == names


def test_adam_takes_every_argument_that_megatron_passes() -> None:
    """Megatron builds the arguments within a function: the dictionary with `betas` in its source."""
    tree = ast.parse(inspect.getsource(optimizer._get_megatron_optimizer_based_on_param_groups))
    literals = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    names = [{key.value for key in node.keys if isinstance(key, ast.Constant)} for node in literals]
    (passed,) = [keys for keys in names if "betas" in keys]
    assert passed <= set(inspect.signature(GroupStepAdam).parameters)


@pytest.mark.parametrize(
    "kind", ["FP32Optimizer", "Float16OptimizerWithFloat16Params", "MixedPrecisionOptimizer"]
)
def test_one_method_of_an_optimizer_has_the_gradients_of_the_norm(kind: str) -> None:
    names = {"get_grads_for_grad_norm", "get_main_grads_for_grad_norm"}
    assert len(names & set(dir(getattr(megatron_optimizer, kind)))) == 1


@pytest.mark.parametrize("option", [{"capturable": True}, {"adam_w_mode": False}])
def test_adam_refuses_what_it_does_not_compute(option: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match=r"captured|decoupled"):
        GroupStepAdam([torch.nn.Parameter(torch.zeros(1))], **option)


def test_the_strategy_is_one_that_megatron_does_not_replace() -> None:
    assert issubclass(torch_dist._Strategy, TorchDistSaveShardedStrategy)


@pytest.mark.parametrize(
    ("installed", "has_common_file", "is_read"),
    [
        ("0.16.1", True, True),
        ("0.16.1", False, False),
        ("0.18.2", False, False),
        ("0.19.0", False, True),
        ("0.19.2", True, True),
        ("0.20.0", False, True),
        ("1.0.0rc1", False, True),
    ],
)
def test_an_older_megatron_refuses_a_newer_ones_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str, has_common_file: bool, is_read: bool
) -> None:
    monkeypatch.setattr(megatron_versions, "VERSION", installed)
    if has_common_file:
        (tmp_path / "common.pt").touch()
    reason = unreadable_reason(tmp_path)
    assert reason is None if is_read else f"newer, and {installed} cannot read it; resume" in str(reason)


def test_which_file_holds_the_common_part_follows_from_the_version() -> None:
    """Until 0.18 `save` writes `common.pt`; from 0.19 on it adds the part to the sharded state."""
    assert ("common_state" in inspect.getsource(serialization.save)) != reads_common_file_only()
