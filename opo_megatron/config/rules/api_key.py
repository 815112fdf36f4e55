"""Rules about keys, of SGLang servers and reward services: a recipe names them and never holds one."""

from __future__ import annotations

import os
import re

from opo_megatron.config.choices import EngineName
from opo_megatron.config.rollout import SglangConfig
from opo_megatron.config.rules.require import require
from opo_megatron.config.schema import Config
from opo_megatron.errors import UserError
from opo_megatron.utils.secrets import is_secret_name

API_KEY = "rollout.sglang.api_key"
_VARIABLE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)\}", re.ASCII)
_KEY = re.compile(r"[!-~]+")
"""What an HTTP header can carry: printable ASCII without spaces."""
_SET_BY_THE_RUN = {
    "api_key": f"would show the key in the list of processes; set {API_KEY}",
    "admin_api_key": f"would show a key in the list of processes; {API_KEY} protects the whole server",
    "host": "is chosen by the run; for a server on another node, use `opo serve --host`",
    "port": "is chosen by the run; for a server on another node, use `opo serve --port`",
}
"""Options of SGLang, and why they cannot be given."""


def check_api_key(config: Config) -> None:
    """Raise UserError for a key in the recipe, a variable without one, and options that concern either."""
    settings = config.rollout.sglang
    for option in settings.options:
        name = option.replace("-", "_").lstrip("_")
        reason = _SET_BY_THE_RUN.get(name)
        require(reason is None, f"rollout.sglang.options.{name} {reason}")
    if config.task.verifier_api_key_env is not None:
        _check_name("task.verifier_api_key_env", config.task.verifier_api_key_env)
    variable = variable_of(settings)
    if variable is not None and config.rollout.engine is EngineName.sglang:
        named_key(variable)


def variable_of(settings: SglangConfig) -> str | None:
    """The environment variable that holds the key.

    Raises:
        UserError: for a key itself, and for a name that does not say that it is one.
    """
    if settings.api_key is None:
        return None
    match = _VARIABLE.fullmatch(settings.api_key)
    if match is None:
        raise UserError(
            f"{API_KEY} does not name a variable, and a key itself has no place in recipes and on command "
            f"lines, which others can read; export NAME_KEY=… and write {API_KEY}='${{oc.env:NAME_KEY}}'"
        )
    _check_name(API_KEY, match[1])
    return match[1]


def _check_name(key: str, variable: str) -> None:
    require(
        re.fullmatch(r"[A-Za-z_]\w*", variable, re.ASCII) is not None,
        f"{key} is not the name of a variable; export NAME_KEY=… and write NAME_KEY there",
    )
    require(
        is_secret_name(variable),
        f"{key} takes the key from the variable {variable}, whose name does not say so, and verifiers would "
        f"get it with their environment; call it {variable}_KEY",
    )


def named_key(variable: str) -> str:
    """The key in an environment variable.

    Raises:
        UserError: where the variable is not set, or holds no key.
    """
    require(
        variable in os.environ,
        f"{API_KEY}: the environment variable {variable} is not set; export {variable}=VALUE",
    )
    require(
        is_key(os.environ[variable]),
        f"{API_KEY}: the environment variable {variable} holds no key, which is printable ASCII without "
        "spaces; export another one",
    )
    return os.environ[variable]


def is_key(text: str) -> bool:
    """Whether a text can be a key."""
    return _KEY.fullmatch(text) is not None
