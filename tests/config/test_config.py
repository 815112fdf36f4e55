"""Recipes: merging, derived fields, YAML round trip, and the description of a batch."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path

import pytest

from opo_megatron.algorithm.config import Baseline, Scale, Scope, Weight
from opo_megatron.algorithm.presets import PRESETS
from opo_megatron.config import Config, load_config, to_yaml
from opo_megatron.config.arithmetic import describe_batch, smallest_world
from opo_megatron.config.choices import TaskName
from opo_megatron.config.compare import changed_settings
from opo_megatron.config.keys import key_types, nearest
from opo_megatron.config.megatron_fields import MANAGED_FIELDS, megatron_field_names
from opo_megatron.config.schema import ModelConfig
from opo_megatron.config.validate import validate
from opo_megatron.errors import UserError
from opo_megatron.tasks import TASKS
from tests.support.paths import RECIPES


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("run:\n  dir: runs/test\n")
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_schema_defaults_are_a_valid_recipe(recipe: Path):
    config = load_config(recipe)
    assert type(config) is Config and type(config.policy.model) is ModelConfig
    assert type(config.optimizer.betas) is list and type(config.policy.megatron) is dict


def test_overrides_win_over_the_recipe_over_its_bases_over_defaults(tmp_path: Path):
    write(
        tmp_path / "bases/root.yaml", "run: {dir: root}\ntrain: {steps: 1}\noptimizer: {lr: 1}\nresume: auto"
    )
    write(tmp_path / "bases/middle.yaml", "base: root.yaml\ntrain: {steps: 2}\noptimizer: {lr: 2}")
    child = write(tmp_path / "child.yaml", "base: bases/middle.yaml\ntrain: {steps: 3}")
    config = load_config(child, ["train.steps=4"])
    assert (config.train.steps, config.optimizer.lr, config.resume) == (4, 2.0, "auto")
    assert (config.run.dir, config.optimizer.clip) == ("root", 1.0)


def test_an_empty_section_keeps_the_defaults(tmp_path: Path):
    path = write(tmp_path / "r.yaml", "run: {dir: x}\noptimizer:\n  # lr: 1\n")
    assert load_config(path).optimizer.lr == 1e-6


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_a_float_may_be_written_in_exponent_notation(tmp_path: Path, text: str):
    path = write(tmp_path / "r.yaml", f"run: {{dir: x}}\noptimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == 1e-4
    assert load_config(path, [f"warm_start.lr={text}"]).warm_start.lr == 1e-4


def test_an_integer_converts_to_a_float(recipe: Path):
    lr = load_config(recipe, ["optimizer.lr=1"]).optimizer.lr
    assert lr == 1.0 and type(lr) is float


def test_scale_none_is_a_choice_and_scale_null_takes_the_preset(recipe: Path):
    grpo = "algorithm.baseline=grpo"
    assert load_config(recipe, [grpo]).algorithm.scale is Scale.std
    assert load_config(recipe, [grpo, "algorithm.scale=none"]).algorithm.scale is Scale.none
    assert load_config(recipe, [grpo, "algorithm.scale=null"]).algorithm.scale is Scale.std


def test_presets_fill_the_four_settings_and_an_explicit_setting_wins(recipe: Path):
    assert set(PRESETS) == set(Baseline)
    for baseline in Baseline:
        algorithm = load_config(recipe, [f"algorithm.baseline={baseline.value}"]).algorithm
        settings = (algorithm.weight, algorithm.leave_one_out, algorithm.scale, algorithm.scope)
        assert settings == PRESETS[baseline][:4]
    algorithm = load_config(recipe, ["algorithm.baseline=rloo", "algorithm.weight=length"]).algorithm
    assert (algorithm.weight, algorithm.leave_one_out) == (Weight.length, True)


def test_presets_are_the_published_estimators():
    group, none = Scope.group, Scale.none
    assert PRESETS[Baseline.opo][:4] == (Weight.length, False, none, group)
    assert PRESETS[Baseline.opo_loo][:4] == (Weight.length, True, none, group)
    assert PRESETS[Baseline.group_mean][:4] == (Weight.one, False, none, group)
    assert PRESETS[Baseline.rloo][:4] == (Weight.one, True, none, group)
    assert PRESETS[Baseline.grpo][:4] == (Weight.one, False, Scale.std, group)
    assert PRESETS[Baseline.batch_length][:4] == (Weight.length, False, none, Scope.batch)


def test_only_auto_enables_variance_reports_by_default(recipe: Path):
    for baseline in Baseline:
        every = load_config(recipe, [f"algorithm.baseline={baseline.value}"]).algorithm.variance_every
        assert every == (10 if baseline is Baseline.auto else 0)
    own = ["algorithm.baseline=auto", "algorithm.variance_every=3"]
    assert load_config(recipe, own).algorithm.variance_every == 3


def test_extra_forward_passes_are_described(recipe: Path):
    def description(*overrides: str) -> str:
        return describe_batch(load_config(recipe, overrides), 1)

    assert "more forward pass" not in description()
    energy = "algorithm.baseline=energy"
    assert "energies are computed by the engine during generation" in description(energy)
    assert "energies take one more forward pass per step" in description(energy, "rollout.engine=sglang")
    clipped = ("algorithm.objective=clipped", "algorithm.updates_per_batch=4")
    assert "log-probabilities of π_old take one more forward pass" in description(*clipped)
    assert "take two more forward passes" in description(*clipped, "algorithm.kl_coefficient=0.1")
    assert "4 optimizer steps, each on its own part of the prompts" in description(*clipped)
    assert "every 10 steps the gradient's variance" in description("algorithm.baseline=auto")


def test_dependent_model_dimensions_are_derived(recipe: Path):
    model = load_config(
        recipe, ["policy.model.hidden_size=256", "policy.model.num_attention_heads=8"]
    ).policy.model
    assert (model.num_query_groups, model.kv_channels, model.moe_ffn_hidden_size) == (8, 32, None)
    model = load_config(
        recipe, ["policy.model.num_moe_experts=4", "policy.model.ffn_hidden_size=64"]
    ).policy.model
    assert model.moe_ffn_hidden_size == 64


def test_loss_constant_defaults_to_the_tokens_of_the_largest_batch(recipe: Path):
    batch = ["rollout.prompts_per_step=3", "rollout.samples_per_prompt=4", "rollout.max_response_tokens=5"]
    constant = [*batch, "algorithm.loss_normalizer=constant"]
    assert load_config(recipe, constant).algorithm.loss_constant == 60.0
    assert load_config(recipe, [*constant, "algorithm.loss_constant=7"]).algorithm.loss_constant == 7.0
    assert load_config(recipe, batch).algorithm.loss_constant is None


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.baseline=rloo", "algorithm.loss_normalizer=constant"],
        ["policy.dtype=bf16", "policy.megatron={recompute_granularity: full, recompute_num_layers: 1}"],
        ["policy.model.num_moe_experts=4", "optimizer.betas=[0, 0.5]", "run.dir=1e-4", "resume=auto"],
        ["task.system_prompt=null # \t${run.seed} \\${x} ", "task.template=0123 {prompt}: no", "run.dir=~"],
    ],
)
def test_printed_yaml_loads_to_the_same_configuration(recipe: Path, tmp_path: Path, overrides: list[str]):
    config = load_config(recipe, overrides)
    reloaded = load_config(write(tmp_path / "printed.yaml", to_yaml(config)))
    assert reloaded == config
    assert to_yaml(reloaded) == to_yaml(config)


def test_enums_are_printed_by_value(recipe: Path):
    assert "dtype: bf16\n" in to_yaml(load_config(recipe, ["policy.dtype=bf16"]))
    for kind in key_types().values():
        if isinstance(kind, type) and issubclass(kind, Enum):
            assert all(choice.value == choice.name for choice in kind)


def test_interpolation_reads_another_key(recipe: Path):
    assert load_config(recipe, ["run.dir=runs/seed-${run.seed}", "run.seed=7"]).run.dir == "runs/seed-7"


def test_every_schema_field_has_a_key_and_a_printable_default():
    def leaves(section: object) -> int:
        return sum(
            leaves(value) if dataclasses.is_dataclass(value) else 1 for value in vars(section).values()
        )

    sections = sum(dataclasses.is_dataclass(kind) for kind in key_types().values())
    assert len(key_types()) == leaves(Config()) + sections


@pytest.mark.parametrize(
    ("key", "closest"),
    [
        ("lr", "optimizer.lr"),
        ("rollout.lr", "optimizer.lr"),
        ("rollout.prompt_per_step", "rollout.prompts_per_step"),
        ("rolout.temperature", "rollout.temperature"),
        ("optimiser", "optimizer"),
        ("policy.num_layers", "policy.model.num_layers"),
        ("zzz", None),
    ],
)
def test_the_nearest_key_is_the_intended_one(key: str, closest: str | None):
    assert nearest(key, key_types()) == closest


def test_managed_fields_are_fields_of_megatron_and_cover_the_model_section():
    assert set(MANAGED_FIELDS) <= megatron_field_names()
    own_fields = {"tie_embeddings", "rotary_base", "rope_scaling", "max_sequence_length", "vocab_size"}
    assert {field.name for field in dataclasses.fields(ModelConfig)} - own_fields <= set(MANAGED_FIELDS)


def test_megatron_field_names_include_those_of_the_base_class():
    names = megatron_field_names()
    assert {"recompute_granularity", "batch_p2p_comm", "overlap_p2p_comm"} <= names
    assert not [name for name in names if name.startswith("_")]


@pytest.mark.slow
def test_megatron_field_names_are_those_of_the_imported_class():
    from megatron.core.transformer import TransformerConfig

    public = {field.name for field in dataclasses.fields(TransformerConfig) if not field.name.startswith("_")}
    assert megatron_field_names() == public


def test_unmanaged_megatron_fields_reach_the_configuration(recipe: Path):
    config = load_config(
        recipe, ["policy.megatron.recompute_granularity=full", "policy.megatron.hidden_dropout=0"]
    )
    assert config.policy.megatron == {"recompute_granularity": "full", "hidden_dropout": 0}


@pytest.mark.parametrize(
    ("layout", "fewest"),
    [
        ({}, 1),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4),
        ({"expert_model_parallel_size": 4}, 4),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}, 4),
        ({"tensor_model_parallel_size": 4, "expert_model_parallel_size": 2}, 4),
        ({"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}, 4),
        ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 3}, 6),
    ],
)
def test_smallest_world_holds_whole_model_and_expert_replicas(layout: dict, fewest: int):
    config = Config()
    for name, value in layout.items():
        setattr(config.policy, name, value)
    assert smallest_world(config) == fewest


def test_valid_parallel_layouts_are_accepted(recipe: Path):
    interleaved = [
        "policy.model.num_layers=8",
        "policy.pipeline_model_parallel_size=2",
        "policy.virtual_pipeline_model_parallel_size=2",
    ]
    load_config(recipe, interleaved, world_size=2)
    load_config(recipe, [*interleaved, "policy.megatron.batch_p2p_comm=false"], world_size=4)
    load_config(
        recipe, ["policy.tensor_model_parallel_size=2", "policy.sequence_parallel=true"], world_size=6
    )
    load_config(
        recipe, ["policy.model.num_moe_experts=4", "policy.expert_model_parallel_size=2"], world_size=4
    )


def test_a_group_of_one_is_accepted_where_its_baseline_excludes_it(recipe: Path):
    one = "rollout.samples_per_prompt=1"
    with pytest.raises(UserError, match="every advantage is 0"):
        load_config(recipe, [one])
    load_config(recipe, [one, "algorithm.baseline=batch_length", "algorithm.leave_one_out=true"])


def test_top_p_and_top_k_are_for_evaluation_or_off_policy_sampling(recipe: Path):
    load_config(recipe, ["eval.top_p=0.9", "eval.top_k=5"])
    load_config(recipe, ["rollout.top_p=0.9", "rollout.top_k=5", "algorithm.off_policy_sampling=true"])


def test_validate_checks_a_configuration_made_in_code(recipe: Path):
    config = load_config(recipe)
    config.optimizer.lr = float("nan")
    with pytest.raises(UserError, match=r"optimizer\.lr is nan"):
        validate(config, 1)


def test_every_task_name_has_a_task():
    assert set(TASKS) == {name.value for name in TaskName}


def test_the_description_names_the_batch_its_split_loss_and_layout(recipe: Path):
    overrides = [
        "rollout.prompts_per_step=10",
        "rollout.samples_per_prompt=4",
        "rollout.max_response_tokens=100",
        "policy.max_tokens_per_micro_batch=500",
        "policy.tensor_model_parallel_size=2",
        "warm_start.steps=5",
    ]
    text = describe_batch(load_config(recipe, overrides, world_size=4), world_size=4)
    for words in (
        "10 prompts × 4 samples = 40 rollouts",
        "generated by 4 ranks: about 10 each",
        "trained on by 2 data-parallel ranks: about 20 each",
        "1 per data-parallel rank if every response has 1 token, 4 if 100",  # 5 × 100 tokens fit in 500
        "ONE optimizer step",
        "N = all response tokens",
        "wⱼ = length of response j in tokens",
        "warm start: 5 SFT steps",
        "4 = 2 tensor × 1 pipeline × 1 context × 2 data parallel",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        ("opo", "Aᵢ = rᵢ − b with"),
        ("opo_loo", "bᵢ = Σⱼ wⱼrⱼ / Σⱼ wⱼ over all other responses"),
        ("group_mean", "wⱼ = 1"),
        ("grpo", "Aᵢ = (rᵢ − b) / s with"),
        ("batch_length", "of the whole batch"),
    ],
)
def test_the_description_shows_the_advantage_formula(recipe: Path, baseline: str, words: str):
    config = load_config(recipe, [f"algorithm.baseline={baseline}"])
    assert words in describe_batch(config, 1)


def test_changed_settings_names_what_a_resumed_run_changes(tmp_path: Path):
    quickstart = RECIPES / "quickstart.yaml"
    recipe = write(
        tmp_path / "config.yaml", to_yaml(load_config(quickstart, ["run.dir=a", "optimizer.lr=2e-4"]))
    )
    same = load_config(quickstart, ["run.dir=b", "optimizer.lr=2e-4", "resume=auto"])
    assert changed_settings(same, recipe) == []
    other = load_config(quickstart, ["run.dir=a", "rollout.prompts_per_step=8"])
    changes = ["rollout.prompts_per_step 48 → 8", "optimizer.lr 0.0002 → 0.0003"]
    assert list(map(str, changed_settings(other, recipe))) == changes
    assert changed_settings(other, tmp_path / "missing.yaml") == []
