"""Recipes: typed schema, loading with `base:` inheritance, validation, batch arithmetic.

Nothing in this package imports torch, so that mistakes in a recipe are reported immediately.
"""

from opo_megatron.config.load import load_config, to_yaml
from opo_megatron.config.schema import Config

__all__ = ["Config", "load_config", "to_yaml"]
