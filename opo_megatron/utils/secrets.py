"""Which environment variables hold keys, by their names, and an environment without them.

Processes that run users' code (verifiers) get `without_secrets(os.environ)`: a verifier that prints, sends or
logs its environment then gives no key away.  A name is all that tells a key from other text, so a variable
that a recipe names for a key must have a name that says so (`is_secret_name`).

It protects against accidents.  Code of the same user can read the environment and the memory of the trainer
itself; only another user, or a container, keeps it from that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_SECRET_NAME = re.compile(
    r"SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY"
    r"|(^|_)(KEYS?|TOKEN|PAT|JWT|AUTH|COOKIES?)$",  # TOKENS is a number of tokens
    re.IGNORECASE,
)
_OTHER_NAMES = frozenset({"SSH_AUTH_SOCK", "KRB5CCNAME", "KUBECONFIG", "NETRC", "MYSQL_PWD", "BW_SESSION"})
"""Ways to a key whose names say nothing of it."""
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
"""As in a proxy's or a data base's address."""


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a key: WANDB_API_KEY, HF_TOKEN, AWS_SECRET_ACCESS_KEY, …"""
    return name.upper() in _OTHER_NAMES or _SECRET_NAME.search(name) is not None


def without_secrets(environ: Mapping[str, str], extra_names: Iterable[str] = ()) -> dict[str, str]:
    """The environment without variables that hold keys.

    Args:
        extra_names: further variables to leave out.
    """
    extra = frozenset(extra_names)
    return {
        name: value
        for name, value in environ.items()
        if name not in extra and not is_secret_name(name) and not _PASSWORD_IN_URL.search(value)
    }
