"""`opo replay`: its command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from opo_megatron.cli.common import add_debug, add_nproc, add_overrides, run_command_on_ranks, world_size
from opo_megatron.config import load_config
from opo_megatron.errors import UserError
from opo_megatron.utils.extras import block_import

SUMMARY = "repeat a step of a run and compare it with its record"
EPILOG = """\
examples:
  opo replay runs/first --step 20
      repeat step 20 from the checkpoint before it; prints that it is equal, or what differs
  opo replay runs/first --step 20 --nproc 2 policy.tensor_model_parallel_size=2
      the same under another layout: equal up to rounding
  opo replay runs/exact --step 20 --rollouts
      of a run with rollout.sglang.exact=true: a server samples the step again, token for token
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo replay`."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--step", metavar="K", type=int, required=True, help="OPO step, 1 or more")
    parser.add_argument(
        "--rollouts",
        action="store_true",
        help="sample by the run's own engine, an SGLang server too, instead of reading recorded rollouts",
    )
    add_overrides(parser)
    add_nproc(parser)
    add_debug(parser)


def run(options: argparse.Namespace) -> int:
    """Repeat the step; with --nproc, start ranks for it."""
    recipe = options.run_dir / "config.yaml"
    if not recipe.exists():
        raise UserError(f"{options.run_dir} is not the folder of a run ({recipe} is missing); name a run.dir")
    config = load_config(recipe, options.overrides, world_size(options.nproc) or 1)
    if (options.nproc or 1) > 1:
        arguments = ["replay", str(options.run_dir), *options.overrides, "--step", str(options.step)]
        arguments += ["--rollouts"] if options.rollouts else []
        arguments += ["--debug"] if options.debug else []
        return run_command_on_ranks(arguments, options.nproc, config.run.threads_per_rank)
    with block_import("wandb"):
        from opo_megatron.replay.replay import replay

    replay(config, options.run_dir, options.step, options.rollouts)
    return 0
