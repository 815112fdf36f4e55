"""The command `opo`: reads the command line, prints a user's mistake as one line, chooses exit codes.

Exit codes: 0 done; 2 a mistake that the user can mend (one line on stderr, no traceback); 3 a replayed
step is not what it was; 75 told to end before the last step, by SIGTERM, SIGUSR1 or run.max_minutes, and
saved: resume=auto goes on; 76 hung, ended by its watchdog; 130 interrupted; with `--nproc`, the code of
the first rank that failed.

One mistake, one line: `opo train` checks the recipe before it starts ranks.  What only a rank can
find is printed by the first rank that claims the launcher's error file, so that the same mistake on
every rank is printed once, and one on a single rank is never lost.  Under torchrun there is no such
file: every rank prints its own line, with its number.

Nothing here imports torch until training starts, so that a mistake in a recipe is answered at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from opo_megatron.cli import eval as eval_command
from opo_megatron.cli import plan, report
from opo_megatron.config import Config, load_config, to_yaml
from opo_megatron.config.arithmetic import describe_batch, smallest_world
from opo_megatron.config.choices import EngineName
from opo_megatron.config.keys import key_types, unknown
from opo_megatron.distributed.launch import CHILD, ERROR_CLAIM, run_ranks
from opo_megatron.environment import doctor
from opo_megatron.errors import (
    EXIT_DIFFERS,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    Preempted,
    ReplayDiffers,
    UserError,
)
from opo_megatron.evaluation.source import find_source
from opo_megatron.rollout.sglang.server import interpreter
from opo_megatron.utils.extras import block_import

EXIT_INTERRUPTED = 130

EXAMPLES = """\
examples:
  opo train recipes/quickstart.yaml run.dir=runs/first
      train on this machine, one process; metrics, checkpoints and rollouts go to runs/first
  opo train recipes/quickstart.yaml run.dir=runs/first resume=auto
      go on from the newest checkpoint of runs/first
  opo train recipes/quickstart.yaml run.dir=runs/tp2 --nproc 2 policy.tensor_model_parallel_size=2
      two ranks that hold the model together
  opo train recipes/quickstart.yaml run.dir=runs/mine task.name=text task.data=problems.jsonl \\
      task.prompt_field=question task.answer_field=answer task.verifier=number \\
      warm_start.steps=0 policy.model.max_sequence_length=600
      your own problems, one JSON object per line; rewarded where the last number is the answer's
  opo train recipes/quickstart.yaml run.dir=runs/first resume=auto optimizer.lr=1e-4 --allow optimizer.lr
      go on with a setting that must not change unless it is meant
  opo replay runs/first --step 20
      do step 20 again from the checkpoint before it: equal, or what differs is named
  opo eval runs/first --samples 16
      pass@k, length, diversity and entropy of the newest checkpoint's answers to held-out problems
  opo config recipes/quickstart.yaml run.dir=runs/first optimizer.lr=1e-4
      print every setting that the run would have, and the arithmetic of its batches
  opo plan recipes/quickstart.yaml
      memory of every rank, the weight sync and the time of a step on GPUs, counted here without one
  opo report runs/first runs/second --out comparison.html
      one page that compares runs: curves, results, times, settings, rollouts
  opo doctor --need gpu --need sglang
      what is installed, what each missing part costs, and how to mend it; exit code 2 where a part that
      is needed is missing or wrong

exit codes:
  0 done    2 a mistake, said in one line    3 `opo replay`: not what it was    130 interrupted
  75 ended before its last step by SIGTERM, SIGUSR1 or run.max_minutes, and saved:
     the same command with resume=auto goes on
  76 no progress for run.hang_minutes: ended, with the stacks of all ranks in run.dir/stacks
"""

_PARSER_STYLE: dict[str, Any] = {
    "epilog": EXAMPLES,
    "formatter_class": argparse.RawDescriptionHelpFormatter,
    "allow_abbrev": False,
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are user errors like all others: one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows examples")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `opo` with these arguments (default: those of the process) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except UserError as error:
        if "--debug" in arguments:
            traceback.print_exc()
        else:
            print_error(error)
        return EXIT_USER_ERROR
    except Preempted:
        return EXIT_PREEMPTED
    except ReplayDiffers as difference:
        print_error(difference)
        return EXIT_DIFFERS
    except KeyboardInterrupt:
        if CHILD not in os.environ:
            print("interrupted; resume=auto goes on from the newest checkpoint of run.dir", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        # A rank that loses its peers has nothing to add to what one of them has said.
        if "--debug" not in arguments and _is_said():
            return EXIT_USER_ERROR
        raise


def _run(arguments: list[str]) -> int:
    parser, commands = _parsers()
    try:
        if arguments and arguments[0] in commands:
            # Only parse_intermixed_args takes options between overrides, and it knows no subcommands.
            options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
        else:
            options = parser.parse_args(arguments)
    except SystemExit as help_was_printed:
        return int(help_was_printed.code or 0)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    description = "On-policy RL of language models with the optimal reward baseline, on Megatron-Core."
    parser = Parser(prog="opo", description=description, **_PARSER_STYLE)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    commands = {}
    for name, run, summary in (
        ("train", _train, "train by a recipe"),
        ("replay", _replay, "do a step of a run again and compare it with what it was"),
        ("config", _config, "print the resolved recipe, and what a step does"),
    ):
        command = subparsers.add_parser(name, help=summary, description=summary, **_PARSER_STYLE)
        add = command.add_argument
        if name == "replay":
            add("run_dir", metavar="RUN", type=Path, help="the run's folder")
            add("--step", metavar="K", type=int, required=True, help="OPO step, 1 or more")
        else:
            add("recipe", metavar="RECIPE", help="YAML file; its `base:` names one to inherit from")
        add("overrides", metavar="key=value", nargs="*", help="replaces a value, e.g. train.steps=10")
        add("--nproc", metavar="N", type=_rank_count, help="number of ranks on this machine")
        add("--debug", action="store_true", help="show the traceback of a user error")
        if name == "train":
            add("--allow", metavar="KEY", action="append", default=[], help="may differ in a resumed run")
        command.set_defaults(run=run)
        commands[name] = command
    style = {**_PARSER_STYLE, "epilog": eval_command.EPILOG}
    command = subparsers.add_parser(
        "eval", help=eval_command.SUMMARY, description=eval_command.SUMMARY, **style
    )
    eval_command.add_arguments(command)
    command.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value of the recipe")
    command.add_argument("--nproc", metavar="N", type=_rank_count, help="number of ranks on this machine")
    command.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    command.set_defaults(run=_eval)
    commands["eval"] = command
    summary = "what is installed, what each missing part costs, and how to mend it"
    command = subparsers.add_parser("doctor", help=summary, description=summary, **_PARSER_STYLE)
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.run)
    commands["doctor"] = command
    style = {**_PARSER_STYLE, "epilog": plan.EPILOG}
    command = subparsers.add_parser("plan", help=plan.SUMMARY, description=plan.SUMMARY, **style)
    command.add_argument("recipe", metavar="RECIPE", help="YAML file; its `base:` names one to inherit from")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="replaces a value")
    command.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    plan.add_arguments(command)
    command.set_defaults(run=plan.run)
    commands["plan"] = command
    style = {**_PARSER_STYLE, "epilog": report.EPILOG}
    command = subparsers.add_parser("report", help=report.SUMMARY, description=report.SUMMARY, **style)
    command.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    report.add_arguments(command)
    command.set_defaults(run=report.run)
    commands["report"] = command
    return parser, commands


def _rank_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of ranks, 1 or more")
    return int(text)


def _config(options: argparse.Namespace) -> int:
    world_size = _world_size(options.nproc)
    config = load_config(options.recipe, options.overrides, world_size)
    description = describe_batch(config, world_size or config.run.ranks or smallest_world(config))
    # As comments, so that the output is a recipe again.
    print(textwrap.indent(description, "# ", predicate=lambda _: True))
    print(to_yaml(config), end="")
    return 0


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.recipe, options.overrides, _world_size(options.nproc) or 1)
    for key in options.allow:
        if key not in key_types():
            raise UserError(f"--allow {key}: {unknown(key, key_types())}")
    if CHILD not in os.environ and os.environ.get("RANK", "0") == "0":
        check_run_dir(config)
        if config.rollout.engine is EngineName.sglang and not config.rollout.sglang.urls:
            interpreter(config.rollout.sglang)
    if (options.nproc or 1) > 1:
        command = [sys.executable, "-m", "opo_megatron", "train", options.recipe, *options.overrides]
        command += [word for key in options.allow for word in ("--allow", key)]
        command += ["--debug"] if options.debug else []
        return run_ranks(command, options.nproc, config.run.threads_per_rank)
    with block_import("wandb"):  # Megatron would import it
        from opo_megatron.train import train  # torch and Megatron take seconds

    train(config, options.allow)
    return 0


def _replay(options: argparse.Namespace) -> int:
    recipe = options.run_dir / "config.yaml"
    if not recipe.exists():
        raise UserError(f"{options.run_dir} is not the folder of a run ({recipe} is missing); name a run.dir")
    config = load_config(recipe, options.overrides, _world_size(options.nproc) or 1)
    if (options.nproc or 1) > 1:
        command = [sys.executable, "-m", "opo_megatron", "replay", str(options.run_dir), *options.overrides]
        command += ["--step", str(options.step), *(["--debug"] if options.debug else [])]
        return run_ranks(command, options.nproc, config.run.threads_per_rank)
    with block_import("wandb"):
        from opo_megatron.replay.replay import replay

    replay(config, options.run_dir, options.step)
    return 0


def _eval(options: argparse.Namespace) -> int:
    source = find_source(options.source, options.out)
    overrides = eval_command.overrides_of(options, source)
    config = load_config(source.recipe, overrides, _world_size(options.nproc) or 1)
    from opo_megatron.tasks.benchmarks import find_benchmarks

    benchmarks = find_benchmarks(options.tasks, eval_command.data_folder(options))
    if (options.nproc or 1) > 1:
        command = [sys.executable, "-m", "opo_megatron", "eval", *eval_command.words_of(options)]
        return run_ranks(command, options.nproc, config.run.threads_per_rank)
    with block_import("wandb"):
        from opo_megatron.evaluation.run_eval import EvalTask, evaluate_weights

    evaluate_weights(config, EvalTask(source, benchmarks, options.problems, options.out))
    return 0


def check_run_dir(config: Config) -> None:
    """Refuse a folder that cannot be written or holds something; asked once, before any rank writes."""
    folder = Path(config.run.dir)
    # Of a folder that is not there yet, the nearest one above it says whether it can be made.
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        where = f"run.dir={folder}" + (f": {above}" if above != folder.absolute() else "")
        raise UserError(f"{where} is a file; choose another run.dir")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={folder} cannot be written ({above} forbids it); choose another run.dir")
    if config.resume == "never" and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"run.dir={folder} is not empty; choose another run.dir, or go on with resume=auto")


def _world_size(nproc: int | None) -> int | None:
    """Ranks by --nproc or by the launcher that started this process; None where neither says."""
    launched = os.environ.get("WORLD_SIZE")
    if launched is None:
        return nproc
    if not launched.isdecimal():
        raise UserError(f"WORLD_SIZE={launched} in the environment is not a number; unset it")
    if nproc is not None:
        raise UserError(
            f"--nproc {nproc} was given, but WORLD_SIZE={launched} says that a launcher started this "
            f"process; leave --nproc out or unset WORLD_SIZE"
        )
    return int(launched)


def _is_said() -> bool:
    """Whether another rank of this launcher has printed a user's mistake."""
    claim = os.environ.get(ERROR_CLAIM)
    return claim is not None and Path(claim).exists()


def print_error(error: UserError | ReplayDiffers) -> None:
    """One line on stderr, once where several ranks make the same mistake."""
    claim, rank = os.environ.get(ERROR_CLAIM), os.environ.get("RANK", "0")
    who = f" (rank {rank})" if claim is None and rank != "0" else ""
    if claim is not None:
        # The launcher ends all ranks when the first returns; the one that claims must still print.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            Path(claim).touch(exist_ok=False)
        except FileExistsError:
            return
    print(f"error{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
