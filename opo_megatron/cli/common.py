"""Shared code of the commands: a parser with one-line errors, rank counts, printing each error once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from opo_megatron.distributed.launch import CHILD, run_ranks
from opo_megatron.distributed.outcome import claim_error, prints_alone
from opo_megatron.errors import EXIT_USER_ERROR, ReplayDiffers, UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, printed as one line."""

    def __init__(self, **options: Any) -> None:
        style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**style, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows examples")


def count_of(what: str, minimum: int = 1) -> Callable[[str], int]:
    """An argparse type: a whole number of `what`, at least `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}, {minimum} or more")
        return int(text)

    return parse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The arguments RECIPE and key=value."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; inherits from the recipe in its `base:`")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="overrides a setting, e.g. train.steps=10"
    )


def add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", metavar="N", type=count_of("ranks"), help="number of ranks on this machine"
    )


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")


def world_size(nproc: int | None) -> int | None:
    """Number of ranks by --nproc or by the launcher of this process; None where neither sets it."""
    launched = os.environ.get("WORLD_SIZE")
    if launched is None:
        return nproc
    if not launched.isdecimal():
        raise UserError(f"WORLD_SIZE={launched} in the environment is not a number; unset it")
    if nproc is not None:
        raise UserError(
            f"--nproc {nproc} was given, but WORLD_SIZE={launched} shows that a launcher started this "
            f"process; remove --nproc or unset WORLD_SIZE"
        )
    return int(launched)


def run_command_on_ranks(arguments: list[str], nproc: int, threads_per_rank: int = 1) -> int:
    """Run `opo ARGUMENTS` on `nproc` ranks; returns the exit code of the first that failed, else 0."""
    command = [sys.executable, "-m", "opo_megatron", *arguments]
    return run_ranks(command, nproc, threads_per_rank, writes_outcome=True)


def is_launched() -> bool:
    """Whether this process is a rank that `--nproc` started."""
    return CHILD in os.environ


def print_error(error: UserError | ReplayDiffers | str, code: int = EXIT_USER_ERROR) -> None:
    """Print one line on stderr, once where several ranks raise the same error.

    Args:
        code: that the process will exit with.
    """
    rank = os.environ.get("RANK", "0")
    who = f" (rank {rank})" if prints_alone() and rank != "0" else ""
    if not prints_alone():
        # The launcher terminates all ranks when the first returns; the rank that claims must still print.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if claim_error(code):
        print(f"error{who}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
