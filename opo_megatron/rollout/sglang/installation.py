"""SGLang as it is installed: its interpreter, its environment variables, and the options of its server.

The server has hundreds of options, which differ by version.  So they are not listed here: its own parser is
asked, in its own environment, whether it knows those of the recipe, before a model is loaded.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from opo_megatron.config.entries import SERVER_OPTIONS
from opo_megatron.config.rollout import SglangConfig
from opo_megatron.errors import UserError
from opo_megatron.utils.start_folder import absolute

SERVE = Path(__file__).parent / "serve.py"
PARENT = "OPO_TRAINER_PID"
"""Variable of a server that ends with the process of this id; `serve.py` has the name as well."""
CHECK = "--check-options"
"""As its first argument, `serve.py` describes the server's parser instead of starting a server."""
_TIMEOUT_SECONDS = 120.0
"""Importing SGLang takes seconds, from a shared file system much longer."""
_TRAINERS_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),  # torchrun's
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
)


def interpreter(settings: SglangConfig) -> Path:
    """The Python interpreter of SGLang's environment.

    Raises:
        UserError: where there is none.
    """
    python = absolute(Path(settings.python).expanduser())
    if not python.exists():
        raise UserError(
            f"rollout.sglang.python={settings.python} does not exist; create that environment with "
            "`make setup-sglang`, or name the interpreter of one that has SGLang"
        )
    return python


def own_environment() -> dict[str, str]:
    """The trainer's environment variables without those of torchrun, of its Python and of its terminal."""
    environment = {name: value for name, value in os.environ.items() if name not in _TRAINERS_VARIABLES}
    return environment | {"PYTHONIOENCODING": "utf-8"}


def by_their_own_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's options by the names that the server's command line has."""
    return {name.replace("_", "-"): value for name, value in options.items()}


def as_words(options: Mapping[str, Any]) -> list[str]:
    """A command line: true is a flag, false and null leave an option out, a list is several words."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, Mapping):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def check_options(settings: SglangConfig) -> None:
    """Refuse `rollout.sglang.options` that the server's own parser does not know.

    Nothing is checked where its environment cannot be asked, such as one on other nodes only; the server then
    refuses them itself, when it starts.
    """
    options = by_their_own_names(settings.options)
    if not options or (answer := _ask_parser(settings, as_words(options))) is None:
        return
    check_names(options, answer["options"])
    if answer["objection"] is not None:
        raise UserError(
            f"{SERVER_OPTIONS} has a value that the SGLang server refuses "
            f"({shorten(answer['objection'], 240, placeholder=' …')}); change it"
        )


def check_names(options: Mapping[str, Any], known: Sequence[Sequence[str]]) -> None:
    """Check names against those of the server's parser, a list for each option of all its names."""
    aliases = {name.removeprefix("--"): names[0] for names in known for name in names}
    given: dict[str, str] = {}
    for name, value in options.items():
        key = f"{SERVER_OPTIONS}.{name.replace('-', '_')}"
        if name not in aliases:
            nearest = difflib.get_close_matches(name, aliases, 1, cutoff=0.7)
            remedy = f"did you mean {nearest[0].replace('-', '_')}?" if nearest else "remove it"
            raise UserError(f"{key} is not an option of the installed SGLang server; {remedy}")
        if value is False and f"no-{name}" in aliases:
            raise UserError(
                f"{key} is false, which SGLang writes as no_{name.replace('-', '_')}=true; set that"
            )
        other = given.setdefault(aliases[name], key)
        if other != key:
            raise UserError(f"{other} and {key} are one option of the SGLang server; remove one")


def _ask_parser(settings: SglangConfig, words: Sequence[str]) -> dict[str, Any] | None:
    """The reply of `serve.py`; None where that environment cannot be asked."""
    python = absolute(Path(settings.python).expanduser())
    try:
        result = subprocess.run(
            [str(python), str(SERVE), CHECK, *words],
            env=own_environment() | {PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
        return dict(json.loads(result.stdout.splitlines()[-1]))  # packages may print before
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
