"""From a recipe file and the command line to one complete, validated `Config`.

The last one wins: the schema's defaults, the recipe of `base:` (after its own base), the recipe, `key=value`
overrides.  Values are stored one by one, so that a mistake is reported with its key, value and file.
`resolve` derives what follows from other fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opo_megatron.algorithm.config import LossNormalizer, Weight
from opo_megatron.algorithm.presets import PRESETS
from opo_megatron.config.architecture import adopt_architecture
from opo_megatron.config.choices import EngineName, Fp8
from opo_megatron.config.keys import describe_type, key_types, unknown
from opo_megatron.config.rules.api_key import API_KEY
from opo_megatron.config.schema import Config
from opo_megatron.config.validate import validate
from opo_megatron.errors import UserError

FREE_SECTION = "policy.megatron"
"""The mapping whose keys are not in the schema; `validate` checks them against Megatron's source."""


class Entry(NamedTuple):
    """One value of a recipe or override, and its file ('' for the command line)."""

    key: str
    value: Any
    file: str


def load_config(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    world_size: int | None = None,
    locate: Callable[[str], str] | None = None,
) -> Config:
    """Read, merge, resolve and validate a recipe.

    Args:
        recipe: a YAML file.  Its optional key `base` names another one, relative to its folder.
        overrides: `key=value` with full keys; the value is parsed as YAML.
        world_size: number of ranks; None is the recipe's, or the fewest that the layout needs.
        locate: `policy.init_from` → the folder whose architecture is read instead.

    Raises:
        UserError: one sentence with the key, its value and the remedy.
    """
    entries = [*_recipe_entries(Path(recipe), ()), *_override_entries(overrides)]
    tree = OmegaConf.structured(Config)
    for entry in entries:
        _store(tree, entry)
    _keep_key_out(tree)
    config = _to_dataclasses(tree)
    if config.policy.init_from is not None:
        if locate is not None:
            config.policy.init_from = locate(config.policy.init_from)
        adopt_architecture(config, {entry.key for entry in entries if entry.value is not None})
    resolve(config)
    validate(config, config.run.ranks if world_size is None else world_size)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as YAML, which loads to the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


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
    for switch, value in PRESETS[algorithm.baseline]._asdict().items():
        if getattr(algorithm, switch) is None:
            setattr(algorithm, switch, value)
    if rollout.sglang.fp8 is None:
        is_blockwise = config.policy.fp8 is Fp8.blockwise
        rollout.sglang.fp8 = is_blockwise and rollout.engine is EngineName.sglang
    if algorithm.variance_every is None:
        algorithm.variance_every = 10 if algorithm.weight is Weight.fitted else 0
    if algorithm.loss_normalizer is LossNormalizer.constant and algorithm.loss_constant is None:
        rollouts = rollout.prompts_per_step * rollout.samples_per_prompt
        algorithm.loss_constant = float(rollouts * rollout.max_response_tokens)


def _recipe_entries(path: Path, children: tuple[Path, ...]) -> Iterator[Entry]:
    """The entries of a recipe after those of its bases; `children` are the recipes based on it."""
    if path.resolve() in [child.resolve() for child in children]:
        chain = " → ".join(str(step) for step in (*children, path))
        raise UserError(f"base: {chain} is a cycle; remove one of these `base:` lines")
    content = _read(path, child=children[-1] if children else None)
    base = content.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"base is {base!r} in {path}; it must be the path of one recipe")
        yield from _recipe_entries(path.parent / base, (*children, path))
    yield from _flatten(content, "", str(path))


def _read(path: Path, child: Path | None) -> dict[Any, Any]:
    name = f"recipe '{path}'" + (f", the base of '{child}'," if child else "")
    try:
        # OmegaConf's loader reads 1e-4 as a number (YAML 1.1: text), and rejects repeated keys.
        content = OmegaConf.load(path)
    except FileNotFoundError:
        hint = "the recipe comes before key=value" if "=" in path.name else "check the path"
        raise UserError(f"{name} does not exist; {hint}") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{name} is not valid YAML{line}: {problem}; fix that line") from None
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; give a YAML file") from None
    except OSError as error:
        # OmegaConf raises OSError, without errno, if the whole file is one number.
        reason = f"cannot be read ({error.strerror})" if error.strerror else "is not a mapping"
        raise UserError(f"{name} {reason}; give a YAML file of `section:` blocks") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{name} has an interpolation that cannot be read: {error.msg}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{name} is a list, not a mapping; write `section:` blocks of `key: value`")
    return cast(dict[Any, Any], OmegaConf.to_container(content, resolve=False))


def _override_entries(overrides: Sequence[str]) -> Iterator[Entry]:
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}' is not key=value; write it like train.steps=10")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException):
            raise UserError(f"override '{override}' has a value that is not valid YAML; quote it") from None
        yield from _flatten({key: cast(dict[str, Any], value)["value"]}, "", "")


def _flatten(content: dict[Any, Any], prefix: str, file: str) -> Iterator[Entry]:
    """Leaves of nested sections; raises for keys that are not in the schema."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        free = key.startswith(FREE_SECTION + ".")
        if not free and key not in key_types():
            raise UserError(unknown(key, key_types()) + _location(file))
        if not free and _is_section(key):
            if isinstance(value, dict):
                yield from _flatten(value, key + ".", file)
            elif value is not None:  # a section without entries is null in YAML
                raise UserError(
                    f"{key} is {value!r}, but it is a section; set one of its keys, like "
                    f"{_first_key(key)}{_location(file)}"
                )
        else:
            yield Entry(key, value, file)


def _is_section(key: str) -> bool:
    return key == FREE_SECTION or any(known.startswith(key + ".") for known in key_types())


def _first_key(section: str) -> str:
    if section == FREE_SECTION:
        return f"{FREE_SECTION}.FIELD"
    return f"{section}.{fields(key_types()[section])[0].name}"


def _location(file: str) -> str:
    return f" (in {file})" if file else ""


def _store(tree: DictConfig, entry: Entry) -> None:
    choices = getattr(key_types().get(entry.key), "__members__", {})
    # YAML reads a bare `off` as false.
    value = "off" if entry.value is False and "off" in choices else entry.value
    if value is False and entry.key == "policy.optimizer_offload":
        value = 0.0  # a boolean in the recipes of older runs
    try:
        OmegaConf.update(tree, entry.key, value, merge=False)
    except OmegaConfBaseException:
        expected = describe_type(key_types().get(entry.key, dict))
        raise UserError(
            f"{entry.key} is {entry.value!r}; it must be {expected}{_location(entry.file)}"
        ) from None


def _keep_key_out(tree: DictConfig) -> None:
    """Keep `${oc.env:NAME}` of `API_KEY` as it is: a configuration is printed and saved, a key is not."""
    value = OmegaConf.to_container(tree.rollout.sglang, resolve=False)["api_key"]  # type: ignore[index,call-overload]
    if isinstance(value, str) and value.startswith("$"):
        OmegaConf.update(tree, API_KEY, "\\" + value, merge=False)


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
