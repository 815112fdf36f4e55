"""`opo train`: validates the recipe and its run.dir, starts ranks, trains."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from opo_megatron.cli.common import (
    add_debug,
    add_nproc,
    add_recipe,
    is_launched,
    run_command_on_ranks,
    world_size,
)
from opo_megatron.config import Config, load_config
from opo_megatron.config.choices import EngineName
from opo_megatron.config.keys import key_types, unknown
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.installation import check_options, interpreter
from opo_megatron.utils.extras import block_import

SUMMARY = "train with a recipe"
EPILOG = """\
examples:
  opo train recipes/quickstart.yaml run.dir=runs/first
      train on this machine, one process; metrics, checkpoints and rollouts go to runs/first
  opo train recipes/quickstart.yaml run.dir=runs/first resume=auto
      resume from the newest checkpoint of runs/first
  opo train recipes/quickstart.yaml run.dir=runs/tp2 --nproc 2 policy.tensor_model_parallel_size=2
      two tensor-parallel ranks
  opo train recipes/quickstart.yaml run.dir=runs/mine task.name=text task.data=problems.jsonl \\
      task.prompt_field=question task.answer_field=answer task.verifier=number \\
      warm_start.steps=0 policy.model.max_sequence_length=600
      your own problems, one JSON object per line; the reward is 1 if the last numbers are equal
  opo train recipes/quickstart.yaml run.dir=runs/median algorithm.baseline=examples.advantages:minus_median
      an advantage estimator of your own: a function of rewards, lengths and groups
  opo train recipes/quickstart.yaml run.dir=runs/first resume=auto optimizer.lr=1e-4 --allow optimizer.lr
      resume with another value of a fixed setting
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo train`."""
    add_recipe(parser)
    add_nproc(parser)
    add_debug(parser)
    parser.add_argument(
        "--allow", metavar="KEY", action="append", default=[], help="setting that a resumed run may change"
    )


def run(options: argparse.Namespace) -> int:
    """Train; with --nproc, start ranks for it."""
    config = load_config(options.recipe, options.overrides, world_size(options.nproc) or 1)
    for key in options.allow:
        if key not in key_types():
            raise UserError(f"--allow {key}: {unknown(key, key_types())}")
    if not is_launched() and os.environ.get("RANK", "0") == "0":
        check_run_dir(config)
        if config.rollout.engine is EngineName.sglang and not config.rollout.sglang.urls:
            interpreter(config.rollout.sglang)
            check_options(config.rollout.sglang)
    if (options.nproc or 1) > 1:
        arguments = ["train", options.recipe, *options.overrides]
        arguments += [word for key in options.allow for word in ("--allow", key)]
        arguments += ["--debug"] if options.debug else []
        return run_command_on_ranks(arguments, options.nproc, config.run.threads_per_rank)
    with block_import("wandb"):  # Megatron would import it
        from opo_megatron.train import train  # torch and Megatron take seconds

    train(config, options.allow)
    return 0


def check_run_dir(config: Config) -> None:
    """Refuse a run.dir that cannot be written or is not empty; once, before any rank writes."""
    folder = Path(config.run.dir)
    # If the folder does not exist, its nearest existing parent decides whether it can be created.
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        where = f"run.dir={folder}" + (f": {existing}" if existing != folder.absolute() else "")
        raise UserError(f"{where} is a file; choose another run.dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"run.dir={folder} cannot be written (no permission in {existing}); choose another run.dir"
        )
    if config.resume == "never" and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"run.dir={folder} is not empty; choose another run.dir, or set resume=auto")
