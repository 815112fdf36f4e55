"""What a resumed run does otherwise than the run so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from opo_megatron.config.load import to_yaml
from opo_megatron.config.schema import Config

_OF_EVERY_START = ("run.dir", "resume")


def changed_settings(config: Config, recipe: Path) -> list[str]:
    """`key old → new` for every key that differs from the resolved recipe of the run so far."""
    if not recipe.exists():
        return []
    before, now = _flat(yaml.safe_load(recipe.read_text())), _flat(yaml.safe_load(to_yaml(config)))
    keys = [key for key in now if key not in _OF_EVERY_START and key in before and before[key] != now[key]]
    return [f"{key} {before[key]} → {now[key]}" for key in keys]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for name, part in tree.items():
        flat |= _flat(part, f"{prefix}{name}.")
    return flat
