"""Objectives and their options: what contradicts is refused in one sentence, the rest is resolved."""

from __future__ import annotations

import pytest

from opo_megatron.algorithm.config import ObjectiveName
from opo_megatron.algorithm.objectives.table import SPECS
from opo_megatron.config.arithmetic import describe_batch
from opo_megatron.config.load import load_config
from opo_megatron.errors import UserError
from tests.support.paths import RECIPES

QUICKSTART = RECIPES / "quickstart.yaml"
OPTIONS = "algorithm.objective_options"


def refusal(settings: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(QUICKSTART, ["run.dir=unused", *settings.split()])
    sentence = str(error.value)
    assert "\n" not in sentence and ". " not in sentence
    return sentence


@pytest.mark.parametrize(
    "settings, part",
    [
        (f"{OPTIONS}.cap=2", "cap is 2, but algorithm.objective=policy_gradient has none; remove it"),
        (
            f"algorithm.objective=clipped {OPTIONS}.clip_low=0.1",
            "algorithm.objective=clipped has none; remove it",
        ),
        (f"algorithm.objective=topr {OPTIONS}.weight=2", "algorithm.objective=topr has none; remove it"),
        (
            f"algorithm.objective=dppo_tv {OPTIONS}.delta=0.2",
            "dppo_tv has only delta_low, delta_high, cap; remove it",
        ),
        (f"algorithm.objective=kimi {OPTIONS}.beta=0.2", "algorithm.objective=kimi has only tau; remove it"),
        (f"algorithm.objective=dro {OPTIONS}={{tau:0.2}}", "has no value; write"),
    ],
)
def test_an_option_that_the_objective_does_not_have_is_refused(settings: str, part: str) -> None:
    assert part in refusal(settings)


@pytest.mark.parametrize(
    "settings, part",
    [
        (f"algorithm.objective=dppo_tv {OPTIONS}.cap=0.5", "cap is 0.5; it must be a number at least 1"),
        (f"algorithm.objective=dppo_tv {OPTIONS}.delta_low=1.5", "it must be a number above 0 and at most 1"),
        (
            f"algorithm.objective=cispo {OPTIONS}.epsilon_high=0",
            "epsilon_high is 0; it must be a number above 0",
        ),
        (f"algorithm.objective=kimi {OPTIONS}.tau=-0.1", "tau is -0.1; it must be a number above 0"),
        (f"algorithm.objective=kimi {OPTIONS}.tau=true", "tau is True; it must be a number above 0"),
        (f"algorithm.objective=kimi {OPTIONS}.tau=much", "tau is 'much'; it must be a number above 0"),
        (f"algorithm.objective=kimi {OPTIONS}.tau=.nan", "tau is nan; it must be a finite number"),
        (
            f"algorithm.objective=m2po {OPTIONS}.threshold=.inf",
            "threshold is inf; it must be a finite number",
        ),
        (f"algorithm.objective=m2po {OPTIONS}.threshold=null", "threshold has no value"),
        (f"algorithm.objective=prime_rl {OPTIONS}.tau_kl=-1", "tau_kl is -1; it must be a number at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: str, part: str) -> None:
    assert part in refusal(settings)


@pytest.mark.parametrize(
    "settings, part",
    [
        ("algorithm.objective=dro", f"algorithm.objective=dro needs {OPTIONS}.beta"),
        (
            f"algorithm.objective=bapo {OPTIONS}.low=0.9",
            f"{OPTIONS}.low is 0.9, which is above {OPTIONS}.highest_low=0.8",
        ),
        (f"algorithm.objective=bapo {OPTIONS}.highest_high=1.1", f"{OPTIONS}.high is 1.2, which is above"),
        ("algorithm.objective=cispo algorithm.clip_high=0.3", "does not read it"),
        (
            "algorithm.objective=gspo algorithm.kl_coefficient=0.1",
            "algorithm.objective=gspo does not read it",
        ),
        ("algorithm.objective=topr algorithm.clip_low=0.1", "it has no options"),
        ("algorithm.objective=pg_is on_policy.action=correct", "weights by the engine's log-probabilities"),
        ("algorithm.objective=minirl on_policy.action=correct", "weights by the engine's log-probabilities"),
        ("algorithm.objective=cispo on_policy.action=correct", "has its own ratio"),
        ("algorithm.objective=topr algorithm.baseline=otb", "has an advantage for each token"),
        ("algorithm.objective=oapl algorithm.baseline=otb_loo", "choose a baseline such as group_mean"),
        ("algorithm.objective=brrl algorithm.baseline=otb", "goes by the reward of a whole response"),
        (
            "algorithm.objective=brrl rollout.samples_per_prompt=1 algorithm.baseline=none",
            "algorithm.objective=brrl compares the rewards of a prompt's responses; raise it",
        ),
        (
            "algorithm.objective=oapl rollout.samples_per_prompt=1 algorithm.baseline=none",
            "algorithm.objective=oapl compares the rewards of a prompt's responses; raise it",
        ),
        ("algorithm.objective=bapo algorithm.updates_per_batch=5", "not divisible by algorithm.updates_per"),
    ],
)
def test_settings_that_contradict_the_objective_are_refused(settings: str, part: str) -> None:
    assert part in refusal(settings)


@pytest.mark.parametrize("name", [name.value for name in ObjectiveName])
def test_a_resolved_recipe_has_every_option_and_is_described_by_its_row(name: str) -> None:
    given = [f"{OPTIONS}.beta=0.5"] if name == "dro" else []
    config = load_config(QUICKSTART, ["run.dir=unused", f"algorithm.objective={name}", *given])
    spec = SPECS[ObjectiveName(name)]
    assert list(config.algorithm.objective_options) == list(spec.options)
    description = describe_batch(config, 1)
    if name not in ("policy_gradient", "clipped"):
        assert spec.formula in description
        assert all(f"{option} = " in description for option in spec.options)
    passes = {"policy_gradient": None, "cispo": "one more forward pass", "bapo": "two more forward passes"}
    if name in passes:
        wanted = passes[name]
        assert ("log-probabilities of" in description) == (wanted is not None)
        assert wanted is None or wanted in description


def test_one_given_option_keeps_the_defaults_of_the_others() -> None:
    settings = ["run.dir=unused", "algorithm.objective=dppo_tv", f"{OPTIONS}={{cap: 3}}"]
    config = load_config(QUICKSTART, settings)
    assert config.algorithm.objective_options == {"delta_low": 0.15, "delta_high": 0.15, "cap": 3}
