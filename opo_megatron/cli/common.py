"""What the commands share: a parser whose errors are one line, rank counts, and how errors are printed once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from opo_megatron.distributed.launch import CHILD, ERROR_CLAIM, run_ranks
from opo_megatron.errors import ReplayDiffers, UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are user errors like all others: one line."""

    def __init__(self, **options: Any) -> None:
        style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**{**style, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` shows examples")


def count_of(what: str, least: int = 1) -> Callable[[str], int]:
    """An argparse type: a whole number of `what`, at least `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}, {least} or more")
        return int(text)

    return parse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file; its `base:` names one to inherit from")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="replaces a value, e.g. train.steps=10"
    )


def add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", metavar="N", type=count_of("ranks"), help="number of ranks on this machine"
    )


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")


def world_size(nproc: int | None) -> int | None:
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


def run_command_on_ranks(arguments: list[str], nproc: int, threads_per_rank: int = 1) -> int:
    """`opo ARGUMENTS` on `nproc` ranks; the exit code of the first that failed, else 0."""
    return run_ranks([sys.executable, "-m", "opo_megatron", *arguments], nproc, threads_per_rank)


def is_launched() -> bool:
    """Whether this process is a rank that `--nproc` started."""
    return CHILD in os.environ


def error_is_printed() -> bool:
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
