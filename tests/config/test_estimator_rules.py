"""Switches of the advantage formula that have no meaning together, and filling: one sentence each."""

from __future__ import annotations

from pathlib import Path

import pytest

from opo_megatron.algorithm.config import Baseline
from opo_megatron.algorithm.presets import PRESETS
from opo_megatron.config import load_config
from opo_megatron.config.arithmetic import describe_batch
from opo_megatron.errors import UserError

FILL = ("rollout.fill=groups_with_signal", "rollout.fill_rounds=3")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text("run: {dir: x}")
    return path


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("baseline=ppo",), "algorithm.baseline is 'ppo'; it must be one of opo, opo_loo"),
        (("baseline=module:",), "algorithm.baseline is 'module:'; it must be one of"),
        (("baseline=:f",), "algorithm.baseline is ':f'; it must be one of"),
        (("baseline=m:f", "weight=length"), "algorithm.weight is length, but algorithm.baseline=m:f"),
        (("baseline=m:f", "shrink=true"), "algorithm.shrink is true, but algorithm.baseline=m:f computes"),
        (("baseline=opo", "shrink=true"), "algorithm.shrink=true needs algorithm.leave_one_out=true"),
        (("baseline=james_stein", "scope=batch"), "algorithm.shrink=true needs algorithm.scope=group"),
        (("baseline=james_stein", "scale=std"), "algorithm.shrink=true needs algorithm.scale=none"),
        (("baseline=rloo", "center=none"), "algorithm.leave_one_out=true needs algorithm.center=mean"),
        (("baseline=remax", "shrink=true"), "algorithm.shrink=true needs algorithm.center=mean"),
        (("baseline=otb", "weight=length"), "algorithm.weight is length, but algorithm.center=token_mean is"),
        (("baseline=otb", "scale=std"), "algorithm.scale is std, but algorithm.center=token_mean is defined"),
        (("baseline=otb_loo", "shift=0.5"), "algorithm.shift is 0.5, but algorithm.center=token_mean"),
        (("baseline=otb", "scope=batch"), "algorithm.scope is batch, but algorithm.center=token_mean"),
        (("baseline=opmd_logmeanexp", "weight=length"), "algorithm.center=logmeanexp is defined with one"),
        (("baseline=opmd", "tau=0"), "algorithm.tau is 0.0; it must be above 0"),
    ],
)  # fmt: skip
def test_switches_without_a_meaning_together_are_refused_by_name(
    recipe: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe, [f"algorithm.{override}" for override in overrides])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("algorithm.scope=batch",), "with algorithm.scope=batch the rewards of all prompts are in one"),
        (("algorithm.baseline=batch_length",), "with algorithm.scope=batch the rewards of all prompts"),
        *(
            ((f"algorithm.baseline={name}",), f"but algorithm.baseline={name} has a gradient there")
            for name in ("none", "asymre", "remax", "raft", "otb", "otb_loo", "james_stein",
                         "reinforce_plus_plus", "reinforce_plus_plus_baseline", "module:function")
        ),
        (("rollout.fill_rounds=1",), "rollout.fill_rounds is 1, where rollout.fill=groups_with_signal"),
        (("rollout.fill_rounds=0",), "rollout.fill_rounds is 0; it must be at least 1"),
        (("rollout.fill=off",), "rollout.fill_rounds is 3, but rollout.fill=off samples one round"),
    ],
)  # fmt: skip
def test_filling_is_refused_where_the_choice_would_change_the_gradient(
    recipe: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe, [*FILL, *overrides])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("baseline", ["opo", "rloo", "grpo", "auto", "maxrl", "reinforce_rej", "opmd"])
def test_filling_is_for_estimators_without_a_gradient_in_agreeing_groups(recipe: Path, baseline: str) -> None:
    config = load_config(recipe, [*FILL, f"algorithm.baseline={baseline}"])
    assert config.rollout.fill_rounds == 3


@pytest.mark.parametrize("baseline", [b.value for b in Baseline])
def test_a_preset_is_its_row_and_loads_again_from_its_own_recipe(
    recipe: Path, tmp_path: Path, baseline: str
) -> None:
    from opo_megatron.config.load import to_yaml

    config = load_config(recipe, [f"algorithm.baseline={baseline}"])
    preset = PRESETS[Baseline(baseline)]
    assert {name: getattr(config.algorithm, name) for name in preset._fields} == preset._asdict()
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("otb_loo",), "bᵢₜ = Σⱼ wⱼₜrⱼ / Σⱼ wⱼₜ over the other responses j to the same prompt"),
        (("otb_loo",), "a gradient remains where all rewards are equal, so no backward pass is skipped"),
        (("otb_loo",), "−(1/N) Σᵢ Σₜ Aᵢₜ log π(yᵢₜ) over responses i"),
        (("asymre",), "Aᵢ = rᵢ − b − (-0.1) with reward r"),
        (("raft",), "Aᵢ = max(rᵢ, 0) with reward r"),
        (("remax",), "one more request per prompt"),
        (("reinforce_rej",), "Aᵢ = 0 where all rewards to the prompt are equal"),
        (("opmd_logmeanexp",), "b = τ log mean exp(r/τ) over all responses to the same prompt, τ = 1"),
        (("james_stein",), "bᵢ is shrunken towards the mean of the other prompts (James–Stein)"),
        (("module:function",), "Aᵢ is computed by module:function from rewards, lengths and groups"),
        (("otb",), "energies are computed by the engine during generation"),
        (("otb", "on_policy.action=correct"), "energies take one more forward pass per step"),
        (("otb", "rollout.engine=sglang"), "energies take one more forward pass per step"),
    ],
)
def test_opo_config_says_what_the_advantages_are(
    recipe: Path, overrides: tuple[str, ...], words: str
) -> None:
    config = load_config(recipe, [f"algorithm.baseline={overrides[0]}", *overrides[1:]])
    assert words in describe_batch(config, 1)


def test_opo_config_says_nothing_of_skipping_where_it_is_on(recipe: Path) -> None:
    assert "no backward pass is skipped" not in describe_batch(load_config(recipe), 1)


def test_one_sample_per_prompt_is_enough_where_it_is_not_its_own_baseline(recipe: Path) -> None:
    for baseline in ("none", "remax", "asymre", "otb_loo", "james_stein", "raft"):
        load_config(recipe, ["rollout.samples_per_prompt=1", f"algorithm.baseline={baseline}"])
    for baseline in ("opo", "rloo", "grpo"):
        with pytest.raises(UserError, match="samples_per_prompt is 1"):
            load_config(recipe, ["rollout.samples_per_prompt=1", f"algorithm.baseline={baseline}"])
