"""What does not go with an environment is refused by one sentence that names both."""

from __future__ import annotations

from pathlib import Path

import pytest

from opo_megatron.config import load_config
from opo_megatron.errors import UserError

OWN = "task.environment=package.module:Class"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text("run: {dir: x}")
    return path


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("task.environment=chess",), "task.environment is 'chess'; it must be one of single_turn, tools"),
        (("task.environment=module:",), "task.environment is 'module:'; it must be one of"),
        (("task.environment_options.a=1",), "task.environment_options is {'a': 1}, but task.environment=sin"),
        ((OWN, "rollout.engine=sglang", "rollout.overlap=true"), f"rollout.overlap=true with {OWN}, whose"),
        (
            (OWN, "rollout.fill=groups_with_signal", "rollout.fill_rounds=3"),
            f"rollout.fill=groups_with_signal with {OWN}, whose",
        ),
        ((OWN, "algorithm.baseline=remax"), f"algorithm.baseline=remax with {OWN}, but its greedy"),
        (("task.environment=tools",), "task.environment=tools needs task.name=text and task.chat=true"),
        (
            ("task.environment=lift_tool", "task.name=text", "task.data=x"),
            "task.environment=lift_tool with task.name=text, but it knows only the lift",
        ),
        ((OWN, "rollout.max_turns=0"), "rollout.max_turns is 0; it must be at least 1"),
        ((OWN, "rollout.environments=0"), "rollout.environments is 0; it must be at least 1"),
        ((OWN, "task.environment_seconds=0"), "task.environment_seconds is 0.0; it must be above 0"),
        ((OWN, "task.environment_memory_mib=-1"), "task.environment_memory_mib is -1; it must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(recipe: Path, overrides: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(recipe, overrides)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (OWN,), (OWN, "rollout.max_turns=1"), (OWN, "task.environment_options.a=[1, 2]"),
        ("task.environment=lift_tool", "task.environment_options.cost=0.2"), (OWN, "algorithm.baseline=rloo"),
    ],
)  # fmt: skip
def test_what_fits_is_accepted(recipe: Path, overrides: tuple[str, ...]) -> None:
    assert load_config(recipe, overrides).task.environment != "single_turn"
