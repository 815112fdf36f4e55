"""`opo config`: the resolved recipe, and a description of its step."""

from __future__ import annotations

import argparse
import sys
import textwrap

import yaml

from opo_megatron.cli.common import add_debug, add_nproc, add_recipe, world_size
from opo_megatron.config import load_config, to_yaml
from opo_megatron.config.arithmetic import describe_batch, smallest_world

SUMMARY = "print the resolved recipe, and what a step does"
EPILOG = """\
examples:
  opo config recipes/quickstart.yaml run.dir=runs/first optimizer.lr=1e-4
      every setting of the run, and its batch arithmetic
  opo config recipes/quickstart.yaml run.dir=runs/bapo algorithm.objective=bapo
      the formula of an off-policy objective, its forward passes, and its options with their defaults
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo config`."""
    add_recipe(parser)
    add_nproc(parser)
    add_debug(parser)


def run(options: argparse.Namespace) -> int:
    """Print the resolved recipe, with its description as comments."""
    size = world_size(options.nproc)
    config = load_config(options.recipe, options.overrides, size)
    description = describe_batch(config, size or config.run.ranks or smallest_world(config))
    print(textwrap.indent(description, "# ", predicate=lambda _: True))
    print(_printable(to_yaml(config)), end="")
    return 0


def _printable(recipe: str) -> str:
    """The YAML with escapes for what the terminal cannot show, so that it loads to the same recipe anyway."""
    try:
        recipe.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return str(yaml.safe_dump(yaml.safe_load(recipe), sort_keys=False))
    return recipe
