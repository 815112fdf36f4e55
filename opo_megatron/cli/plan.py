"""`opo plan`: its command line; the plan is made in `plan/`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from opo_megatron.cli.common import add_debug, add_recipe, count_of
from opo_megatron.errors import UserError
from opo_megatron.utils.extras import block_import

if TYPE_CHECKING:
    from opo_megatron.plan.plan import Job

SUMMARY = "memory of every rank, weight sync and time of a run, without a GPU"
EPILOG = """\
examples:
  opo plan recipes/quickstart.yaml
      the fewest GPUs that the layout needs
  opo plan my.yaml --gpus 64 --gpu h200 policy.tensor_model_parallel_size=8
      another layout, on other GPUs; does it fit?
  opo plan my.yaml policy.init_from=Llama-3.1-70B policy.dtype=bf16 --gpus 64 --mean-response 2000
      a model by its name, without its weights; responses of 2,000 tokens on average
  opo plan my.yaml --overlap --lengths runs/mine
      how many nodes should serve, if training overlaps with generation?
  opo plan my.yaml --gpus 64 --best
      the five fastest layouts that fit, and what to change in the recipe; takes up to two minutes
  opo plan my.yaml --gpus 64 --json | jq '.times.step, .parameters'
      for scripts

The code that trains builds every rank on tensors without memory: parameters, gradients, optimizer state,
activations and the weight stream are counted.  SGLang's memory and all times are modelled; --json prints the
models' constants with their sources.  Exit code 2 if the recipe does not fit; the last line names the nearest
settings that do.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo plan`."""
    add_recipe(parser)
    add_debug(parser)
    add = parser.add_argument
    add("--gpus", metavar="N", type=count_of("GPUs"), help="number of GPUs; default the recipe's run.ranks")
    add("--gpu", metavar="KIND", default="h100", help="h100 (80 GB) or h200 (141 GB); default h100")
    add(
        "--mean-response",
        metavar="TOKENS",
        type=float,
        help="mean length of a response; default half of rollout.max_response_tokens",
    )
    add(
        "--overlap",
        action="store_true",
        help="also simulate steps with engines on nodes of their own (rollout.overlap)",
    )
    add(
        "--lengths",
        metavar="RUN",
        type=Path,
        help="with --overlap: the response lengths of a run's rollout files; default log-normal ones",
    )
    add(
        "--best",
        action="store_true",
        help="search all layouts for the shortest predicted step that fits, instead of planning the recipe's",
    )
    add("--json", action="store_true", help="print the whole plan as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        UserError: for a recipe that does not fit, after its plan is printed, naming settings that do.
    """
    from opo_megatron.plan.hardware import GPUS, gpu_of

    gpu = gpu_of(options.gpu)
    progress = _Progress()
    progress("loading Megatron", 0.0)
    with block_import("wandb"):  # Megatron would import it
        from opo_megatron.plan.plan import load_job, make_plan
        from opo_megatron.plan.search import gpu_that_fits, nearest_fit
        from opo_megatron.plan.show import show, to_json
        from opo_megatron.plan.show_overlap import show_overlap

    arguments = (options.recipe, options.overrides, options.gpus, gpu, options.mean_response)
    job = load_job(*arguments)
    if options.best:
        return _show_best(options, job, progress)
    plan = make_plan(job, progress)
    nearest = None
    if plan.problem is not None:
        nearest = nearest_fit(options.recipe, options.overrides, job, options.mean_response, progress)
    progress.close()
    if options.json:
        print(json.dumps(to_json(plan, nearest), indent=1))
    else:
        console = Console(file=sys.stdout, highlight=False)
        show(plan, console)
        if options.overlap:
            show_overlap(plan, options.lengths, console)
    if plan.problem is None:
        return 0
    other = gpu_that_fits(job, GPUS)
    remedy = "the nearest that fits adds " + " ".join(nearest) if nearest else (
        "no layout that fits was found; use more GPUs" + (f" or --gpu {other}" if other else "")
    )  # fmt: skip
    raise UserError(f"{plan.problem}; {remedy}")


def _show_best(options: argparse.Namespace, job: Job, progress: _Progress) -> int:
    """Print the fastest layouts.

    Raises:
        UserError: where none fits.
    """
    from opo_megatron.plan.best import MARGIN, propose
    from opo_megatron.plan.show_best import best_to_json, show_best

    present, found = propose(options.recipe, options.overrides, job, options.mean_response, progress)
    progress.close()
    if options.json:
        print(json.dumps(best_to_json(present, found), indent=1))
    else:
        show_best(present, found, Console(file=sys.stdout, highlight=False))
    if not found:
        raise UserError(
            f"no layout of {options.recipe} on {job.gpus} × {job.gpu.name.upper()} was found that leaves "
            f"{MARGIN:.0%} of the memory free; use more GPUs (--gpus), or larger ones (--gpu h200)"
        )
    return 0


class _Progress:
    """A status line on stderr, in a terminal only."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        console = Console(file=sys.stderr, highlight=False)
        self._status = console.status("") if console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def __call__(self, text: str, done: float) -> None:
        if self._status is not None:
            seconds = time.monotonic() - self._started
            self._status.update(f"{done:4.0%}  {seconds:3.0f} s  {text}")

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
