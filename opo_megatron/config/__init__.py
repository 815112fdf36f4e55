"""Recipes: typed schema, loading with `base:` inheritance, validation, batch arithmetic.

Nothing in this room imports torch, so that a mistake in a recipe is answered at once.
"""

from opo_megatron.config.load import load_config, to_yaml
from opo_megatron.config.schema import Config

__all__ = ["Config", "load_config", "to_yaml"]
