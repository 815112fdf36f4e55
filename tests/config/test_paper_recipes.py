"""The recipes of the paper's comparison: how each differs from OPO's; all generate equally many samples."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from opo_megatron.config import Config, load_config, to_yaml
from tests.support.scaled_down import RECIPES, SCALES

GRPO = {"algorithm.baseline": "grpo", "algorithm.weight": "one", "algorithm.scale": "std"}
OFF_POLICY = {
    **GRPO,
    "algorithm.objective": "clipped",
    "algorithm.updates_per_batch": 4,
    "algorithm.kl_coefficient": 0.001,
}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "paper/opo": {},
    "paper/grpo_on_policy": GRPO,
    "paper/grpo_off_policy": OFF_POLICY,
    "paper_small/opo": {},
    "paper_small/opo_leave_one_out": {"algorithm.baseline": "opo_loo", "algorithm.leave_one_out": True},
    "paper_small/energy": {"algorithm.baseline": "energy", "algorithm.weight": "energy"},
    "paper_small/group_mean": {"algorithm.baseline": "group_mean", "algorithm.weight": "one"},
    "paper_small/rloo": {
        "algorithm.baseline": "rloo",
        "algorithm.weight": "one",
        "algorithm.leave_one_out": True,
    },
    "paper_small/grpo_on_policy": GRPO,
    "paper_small/grpo_off_policy": OFF_POLICY,
}
"""Recipe → every key but run.dir whose value differs from opo.yaml in the same folder."""


@cache
def recipe(name: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml", (), SCALES.get(name, 1))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, dict) and value
        flattened |= flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flattened


def test_every_paper_recipe_has_its_differences_listed() -> None:
    files = [path for folder in ("paper", "paper_small") for path in (RECIPES / folder).glob("*.yaml")]
    assert {f"{path.parent.name}/{path.stem}" for path in files} == set(DIFFERENCES)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_paper_recipe_differs_from_opo_only_in_its_estimator(name: str) -> None:
    folder = name.split("/")[0]
    opo, other = (flat(yaml.safe_load(to_yaml(recipe(one)))) for one in (f"{folder}/opo", name))
    assert other.pop("run.dir") == f"runs/{name}"
    assert opo.pop("run.dir") == f"runs/{folder}/opo"
    assert {key: value for key, value in other.items() if opo[key] != value} == DIFFERENCES[name]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_all_paper_recipes_generate_equally_many_samples(name: str) -> None:
    config = recipe(name)
    samples = config.train.steps * config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    assert samples == {"paper": 200 * 128 * 8, "paper_small": 100 * 48 * 8}[name.split("/")[0]]


@pytest.mark.parametrize("path", sorted((RECIPES / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_of_the_papers_recipes_names_its_source(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.startswith("  ") and line[2] != "#"]
    values = [line for line in lines if not line.strip().startswith("dir:")]
    assert values
    for line in values:
        comment = line.partition("  # ")[2]
        assert "stated by the paper" in comment or "assumed" in comment, line
