"""From a recipe file and the command line to one complete, validated `Config`.

The last one wins: the schema's defaults, the recipe of `base:` (after its own base), the recipe, `key=value`
overrides.  Values are stored one by one, so that a mistake is reported with its key, value and file.
`resolve` derives what follows from other fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException, ValidationError

from opo_megatron.algorithm.config import LossNormalizer, Weight
from opo_megatron.algorithm.objectives.table import with_defaults
from opo_megatron.algorithm.presets import preset_of
from opo_megatron.config.architecture import adopt_architecture
from opo_megatron.config.choices import EngineName, Fp8, ReplayMethod
from opo_megatron.config.entries import Entry, location, override_entries, recipe_entries
from opo_megatron.config.keys import describe_type, inner_type, key_types
from opo_megatron.config.rules.api_key import API_KEY
from opo_megatron.config.schema import Config
from opo_megatron.config.validate import validate
from opo_megatron.errors import UserError


def load_config(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    locate: Callable[[str], str] | None = None,
) -> Config:
    """Read, merge, resolve and validate a recipe.

    Args:
        recipe: a YAML file.  Its optional key `base` names another one, relative to its folder.
        overrides: `key=value` with full keys; the value is YAML, and where the key takes text, that text.
        world_size: number of ranks; None is the recipe's, or the fewest that the layout needs.
        locate: `policy.init_from` → the folder whose architecture is read instead.

    Raises:
        UserError: one sentence with the key, its value and the remedy.
    """
    entries = [*recipe_entries(Path(recipe)), *override_entries(overrides)]
    tree = OmegaConf.structured(Config)
    for entry in entries:
        _store(tree, entry)
    config = _to_dataclasses(tree)
    if config.policy.init_from is not None:
        folder = config.policy.init_from if locate is None else locate(config.policy.init_from)
        given = {entry.key for entry in entries if entry.value is not None}
        adopt_architecture(config, given, Path(folder))
    resolve(config)
    validate(config, config.run.ranks if world_size is None else world_size)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML, which loads to the same configuration."""
    tree = OmegaConf.structured(_escaped(config))
    OmegaConf.update(tree, API_KEY, config.rollout.sglang.api_key)  # the name of a variable, not escaped
    return OmegaConf.to_yaml(tree)


def _escaped(value: Any) -> Any:
    """A copy in which `${` of a text is not the beginning of an interpolation; those were resolved."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _escaped(entry) for name, entry in vars(value).items()})
    return value


def resolve(config: Config) -> None:
    """Derive, in place, the fields whose default follows from other fields."""
    model, algorithm, rollout = config.policy.model, config.algorithm, config.rollout
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    if model.kv_channels is None and model.num_attention_heads > 0:
        if model.hidden_size % model.num_attention_heads:
            raise UserError(
                f"policy.model.hidden_size {model.hidden_size} is not divisible by num_attention_heads "
                f"{model.num_attention_heads}; change one of them or set policy.model.kv_channels"
            )
        model.kv_channels = model.hidden_size // model.num_attention_heads
    if model.num_moe_experts is not None and model.moe_ffn_hidden_size is None:
        model.moe_ffn_hidden_size = model.ffn_hidden_size
    if config.policy.expert_tensor_parallel_size is None:
        dense = model.num_moe_experts is None
        config.policy.expert_tensor_parallel_size = 1 if dense else config.policy.tensor_model_parallel_size
    for switch, value in preset_of(algorithm.baseline)._asdict().items():
        if getattr(algorithm, switch) is None:
            setattr(algorithm, switch, value)
    algorithm.objective_options = with_defaults(algorithm)
    if rollout.overlap_micro_batches is None:
        rollout.overlap_micro_batches = 2 * config.policy.pipeline_model_parallel_size
    if rollout.routing_replay is None:
        rollout.routing_replay = model.num_moe_experts is not None
    replay, is_spear = rollout.replay, rollout.replay.method is ReplayMethod.spear
    if replay.size is None:
        replay.size = 2048 if is_spear else 16
    if replay.max_age is None and is_spear:
        replay.max_age = 10
    if replay.ramp_steps is None:
        replay.ramp_steps = 200 if is_spear else 0
    if replay.min_size is None:
        replay.min_size = replay.size
    if rollout.sglang.fp8 is None:
        is_blockwise = config.policy.fp8 is Fp8.blockwise
        rollout.sglang.fp8 = is_blockwise and rollout.engine is EngineName.sglang
    if algorithm.variance_every is None:
        algorithm.variance_every = 10 if algorithm.weight is Weight.fitted else 0
    if algorithm.loss_normalizer is LossNormalizer.constant and algorithm.loss_constant is None:
        rollouts = rollout.prompts_per_step * rollout.samples_per_prompt
        algorithm.loss_constant = float(rollouts * rollout.max_response_tokens)


def _store(tree: DictConfig, entry: Entry) -> None:
    hint, value = key_types().get(entry.key), entry.value
    if value is False and entry.key == "policy.optimizer_offload":
        value = 0.0  # a boolean in the recipes of older runs
    if entry.key == API_KEY and value is not None:
        # `${oc.env:NAME}` stays as it is: a configuration is printed and saved, and a key is not.
        value = _escaped(str(value))
    try:
        if inner_type(hint) is str and not isinstance(value, str | None):
            raise ValidationError  # OmegaConf would convert it
        OmegaConf.update(tree, entry.key, value, merge=False)
    except GrammarParseError:
        raise UserError(
            f"{entry.key} is {value!r}, whose ${{…}} cannot be read; fix it, or write \\${{ for these two "
            f"characters{location(entry.file)}"
        ) from None
    except OmegaConfBaseException:
        expected = describe_type(hint or dict)
        raise UserError(f"{entry.key} is {value!r}; it must be {expected}{location(entry.file)}") from None


def _to_dataclasses(tree: DictConfig) -> Config:
    try:
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise UserError(f"{missing[0]} is not set; add {missing[0]}=VALUE to the command or the recipe")
        return cast(Config, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        unset = re.search(r"Environment variable '(\w+)' not found", str(error.msg))
        if unset:
            name = unset.group(1)
            raise UserError(f"{key}the environment variable {name} is not set; export {name}=VALUE") from None
        raise UserError(f"{key}{str(error.msg).splitlines()[0]}; check the ${{…}} in its value") from None
