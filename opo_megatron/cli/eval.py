"""`opo eval`: its command line; the evaluation is in `evaluation/run_eval.py`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from opo_megatron.cli.common import (
    add_debug,
    add_nproc,
    add_overrides,
    count_of,
    run_command_on_ranks,
    world_size,
)
from opo_megatron.config import load_config
from opo_megatron.errors import UserError
from opo_megatron.evaluation.source import Source, find_source
from opo_megatron.utils.extras import block_import

SUMMARY = "evaluate a run, a checkpoint or initial weights: accuracy (pass@k), length, diversity, entropy"
EPILOG = """\
examples:
  opo eval runs/first
      the newest checkpoint of a run on the held-out problems of its recipe
  opo eval runs/first/checkpoints/step_00000100 --samples 16 --problems 200
      one checkpoint, 16 responses to each of 200 problems: pass@1, 2, 4, 8 and 16
  opo eval runs/math --tasks math500,gsm8k,aime24 --data data --samples 16 rollout.max_response_tokens=8192
      benchmarks by name: data/math500.jsonl (or data/math500/test.jsonl, data/math500/math500.json), …
  opo eval runs/math --tasks mine=problems.jsonl task.prompt_field=question --out runs/mine
      a file of your own, with the recipe's fields and verifier
  opo eval my.yaml policy.init_from=models/Qwen3-8B --tasks math500 --data data --out runs/start --nproc 2
      the weights that a recipe starts from, on two ranks

DIR/eval.json has the printed results with 95 % intervals (bootstrap over problems), DIR/samples_TASK.jsonl
every response.  DIR is RUN/eval/CHECKPOINT or --out, and contains nothing else.  Problems, seed and sampling
are those of the recipe's evaluations (eval.temperature, eval.top_p, eval.top_k,
rollout.max_response_tokens): `held_out` repeats the run's own evaluation at that step.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo eval`."""
    add = parser.add_argument
    add(
        "source",
        metavar="RUN|CHECKPOINT|RECIPE",
        type=Path,
        help="folder of a run (its newest checkpoint), of one checkpoint, or a YAML file (initial weights)",
    )
    add(
        "--tasks",
        metavar="NAMES",
        default="held_out",
        help="held_out (default), math500, math, gsm8k, aime24, aime25, name=path.jsonl; comma-separated",
    )
    add("--data", metavar="DIR", type=Path, help="folder of the benchmarks' files; default $OPO_TEST_DATA")
    add(
        "--samples",
        metavar="N",
        type=count_of("samples"),
        help="responses per problem; default eval.samples_per_problem",
    )
    add(
        "--problems",
        metavar="M",
        type=count_of("problems"),
        help="problems per task; default eval.problems for held_out, all for others",
    )
    add("--out", metavar="DIR", type=Path, help="folder of the results; default RUN/eval/CHECKPOINT")
    add_overrides(parser)
    add_nproc(parser)
    add_debug(parser)


def run(options: argparse.Namespace) -> int:
    """Evaluate; with --nproc, start ranks for it."""
    source = find_source(options.source, options.out)
    config = load_config(source.recipe, overrides_of(options, source), world_size(options.nproc) or 1)
    from opo_megatron.tasks.benchmarks import find_benchmarks

    benchmarks = find_benchmarks(options.tasks, data_folder(options))
    if (options.nproc or 1) > 1:
        return run_command_on_ranks(
            ["eval", *arguments_of(options)], options.nproc, config.run.threads_per_rank
        )
    with block_import("wandb"):
        from opo_megatron.evaluation.run_eval import EvalTask, evaluate_weights

    evaluate_weights(config, EvalTask(source, benchmarks, options.problems, options.out))
    return 0


def data_folder(options: argparse.Namespace) -> Path | None:
    """The folder of the benchmarks' files."""
    if options.data is not None:
        if not options.data.is_dir():
            raise UserError(f"--data {options.data} is not a folder; name the one with the benchmarks' files")
        return Path(options.data)
    default = os.environ.get("OPO_TEST_DATA")
    return Path(default) if default else None


def overrides_of(options: argparse.Namespace, source: Source) -> list[str]:
    """All overrides of the recipe; the user's come last."""
    run_dir = [f"run.dir={options.out}"] if options.out is not None else []
    samples = [f"eval.samples_per_problem={options.samples}"] if options.samples is not None else []
    return [*source.overrides, *run_dir, *samples, *options.overrides]


def arguments_of(options: argparse.Namespace) -> list[str]:
    """The command line for ranks, without --nproc."""
    arguments = [str(options.source), *options.overrides, "--tasks", options.tasks]
    for name in ("data", "samples", "problems", "out"):
        value = getattr(options, name)
        arguments += [] if value is None else [f"--{name}", str(value)]
    return arguments + (["--debug"] if options.debug else [])
