"""The command `opo`: parses the command line, prints a user error as one line, sets the exit code.

Exit codes: 0 done; 1 an internal error, or ended by a call of exit in anybody's code; 2 a user error (one
line on stderr, no traceback); 3 a replayed step differs from the recorded one; 75 stopped before the last
step, by SIGTERM, SIGUSR1 or run.max_minutes, and saved: resume=auto resumes; 76 hung, ended by its watchdog;
130 interrupted; 143 ended by a second SIGTERM, without saving; with `--nproc`, the code of the first rank
that failed.

An error is printed once: `opo train` validates the recipe before it starts ranks.  An error that occurs on
ranks is printed by the first rank that claims the launcher's error file, so that the same error on all ranks
is printed once, and an error on one rank is never lost.  Under torchrun there is no such file: every rank
prints its own line, with its number.

Nothing here imports torch until training starts, so that a mistake in a recipe is reported immediately.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

from opo_megatron.cli import (
    config,
    convert,
    data,
    doctor,
    eval,
    export,
    plan,
    preflight,
    replay,
    report,
    serve,
    train,
)
from opo_megatron.cli.common import Parser, is_launched, print_error
from opo_megatron.distributed import outcome
from opo_megatron.errors import (
    EXIT_DIFFERS,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    Preempted,
    ReplayDiffers,
    UserError,
)
from opo_megatron.utils.start_folder import started_here

PEER_SECONDS = 0.5
"""How much later than a rank that failed the launcher may find out."""

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "eval": eval,
    "replay": replay,
    "report": report,
    "config": config,
    "data": data,
    "plan": plan,
    "convert": convert,
    "export": export,
    "serve": serve,
    "preflight": preflight,
    "doctor": doctor,
}
"""Each module has SUMMARY, EPILOG, add_arguments(parser) and run(options) → exit code."""

EPILOG = """\
examples:
  opo train recipes/quickstart.yaml run.dir=runs/first
      train on this machine, one process; metrics, checkpoints and rollouts go to runs/first
  opo data recipes/quickstart.yaml
      how a recipe reads its problems: prompts, tokens, answers, lengths
  opo train recipes/quickstart.yaml run.dir=runs/first resume=auto
      resume from the newest checkpoint of runs/first
  opo eval runs/first --samples 16
      pass@k, length, diversity and entropy of the newest checkpoint on held-out problems
  opo report runs/first runs/second --out comparison.html
      one page that compares runs: curves, results, times, settings, rollouts
  opo export runs/first/checkpoints/step_00000140 models/first
      export a checkpoint as a Hugging Face folder
  opo plan recipes/quickstart.yaml
      memory of every rank, weight sync and time of a step on GPUs, without a GPU
`opo COMMAND --help` has more.

exit codes:
  0 done    2 a user error, in one line    3 `opo replay`: the step differs    130 interrupted
  1 an internal error, or ended by a call of exit in anybody's code
  75 stopped before its last step by SIGTERM, SIGUSR1 or run.max_minutes, and saved:
     the same command with resume=auto resumes
  76 no progress for run.hang_minutes: ended, with the stacks of all ranks in run.dir/stacks
  143 ended by a second SIGTERM, without saving; resume=auto resumes from the last checkpoint
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `opo` with these arguments (default: the process's); returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    outcome.start_command(arguments[0] if arguments else "")
    code = _exit_code(arguments)
    outcome.write_exit(code)
    return code


def _exit_code(arguments: list[str]) -> int:
    """Run the command, and print what ended it."""
    try:
        with started_here():
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
        print_error(difference, EXIT_DIFFERS)
        return EXIT_DIFFERS
    except KeyboardInterrupt:
        if not is_launched():
            print("interrupted; resume=auto resumes from the newest checkpoint of run.dir", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as call:  # nothing of ours exits: it would end a run as if it were done
        if "--debug" in arguments:
            traceback.print_exc()
        who = "the run" if arguments[0] == "train" else f"`opo {arguments[0]}`"
        code = int(call.code if isinstance(call.code, int) else call.code is not None)
        print_error(outcome.ended_early(who, code, caller=_caller(call)), EXIT_FAILED)
        return EXIT_FAILED
    except Exception:
        # The exception of a rank that lost its peers adds nothing to the error that one of them printed.
        code_of_peer = None if "--debug" in arguments else outcome.claimed_code(PEER_SECONDS)
        if code_of_peer is None:
            raise
        return code_of_peer


def _caller(call: SystemExit) -> str:
    """Who called exit, by the innermost frame."""
    frames = traceback.extract_tb(call.__traceback__)
    *_, frame = (frame for frame in frames if "_sitebuiltins" not in frame.filename)  # the function `exit`
    return f"{frame.name} ({frame.filename}, line {frame.lineno})"


def _run(arguments: list[str]) -> int:
    parser, commands = _parsers()
    try:
        if arguments and arguments[0] in commands:
            # Only parse_intermixed_args accepts options between overrides, and not with subparsers.
            options = commands[arguments[0]].parse_intermixed_args(arguments[1:])
        else:
            options = parser.parse_args(arguments)
    except SystemExit as help_was_printed:
        return int(help_was_printed.code or 0)
    options.arguments = arguments
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    description = "On-policy RL of language models with the optimal reward baseline, on Megatron-Core."
    parser = Parser(prog="opo", description=description, epilog=EPILOG)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    commands = {}
    for name, module in COMMANDS.items():
        command = subparsers.add_parser(
            name, help=module.SUMMARY, description=module.SUMMARY, epilog=module.EPILOG
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
        commands[name] = command
    return parser, commands
