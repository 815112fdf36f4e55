"""`opo preflight`: its command line; the checks are in `environment/preflight.py`."""

from __future__ import annotations

import argparse

from opo_megatron.cli.common import add_debug, add_recipe

SUMMARY = "check every node before a job loads a model: GPUs, disk, versions, recipe, bandwidth"
EPILOG = """\
examples:
  opo preflight recipes/quickstart.yaml
      this machine only
  torchrun --nnodes 8 --nproc-per-node 8 … -m opo_megatron preflight my.yaml
      all nodes of a job, with the bandwidth of an all-reduce over them

Exit code 2 and one line per problem if a node is not fit.  OPO_MIN_ALL_REDUCE_GB_PER_S, OPO_MIN_FREE_DISK_GB
and OPO_MIN_FREE_GPU_SHARE set the limits.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo preflight`."""
    add_recipe(parser)
    add_debug(parser)


def run(options: argparse.Namespace) -> int:
    """Check the nodes of all ranks."""
    from opo_megatron.environment.preflight import check_nodes

    return check_nodes(options.recipe, options.overrides)
