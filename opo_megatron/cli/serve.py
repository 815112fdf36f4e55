"""`opo serve`: an SGLang server for a recipe's model, for `rollout.sglang.urls` of a run on other nodes."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import tempfile
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path

from opo_megatron.cli.common import add_debug, add_recipe, count_of
from opo_megatron.config import load_config
from opo_megatron.config.choices import Device, EngineName
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.installation import SERVE, check_options, interpreter
from opo_megatron.rollout.sglang.server import Server, write_model_config

SUMMARY = "start an SGLang server for a recipe's model, for runs on other nodes"
EPILOG = """\
examples:
  opo serve my.yaml rollout.sglang.api_key_file=runs/my.key --port 10123
      then, on the training nodes:
      rollout.sglang.urls=[http://HOST:10123] rollout.sglang.transport=distributed
      rollout.sglang.api_key_file=runs/my.key

The server starts with dummy weights, like a run's own, on the node's first
rollout.sglang.tensor_parallel_size GPUs; the run sends its weights before every step.
The file with the key is made if it does not exist, and only you can read it.  Where the nodes
share no folder, export the same key on all of them: rollout.sglang.api_key='${oc.env:MY_KEY}'.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo serve`."""
    add_recipe(parser)
    add_debug(parser)
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        help="address or name that the server listens on, and runs use; default: this machine's own",
    )
    parser.add_argument(
        "--port", metavar="N", type=count_of("a port"), required=True, help="port that the server listens on"
    )


def run(options: argparse.Namespace) -> int:
    """Replace this process by the server."""
    host = options.host or own_address()
    command, environment, key = server_command(options.recipe, options.overrides, host, options.port)
    print(f"starts an SGLang server at http://{host}:{options.port}", flush=True)
    _put_on_stdin(key)
    os.execve(command[0], command, environment)


def own_address() -> str:
    """The address at which other nodes reach this one: that of its name, or of its default route.

    Raises:
        UserError: where neither leads to other nodes.
    """
    name = socket.gethostname()
    found = []
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(name))
    # Debian's /etc/hosts gives a machine's own name an address that it alone can reach.
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        found.append(probe.getsockname()[0])
    for address in found:
        if not ip_address(address).is_loopback:
            return address
    raise UserError(
        f"the name of this machine, {name}, leads to no address that other nodes reach; add --host ADDRESS, "
        "the one in rollout.sglang.urls (127.0.0.1 for a run on this machine)"
    )


def server_command(
    recipe: str, overrides: Sequence[str], host: str, port: int
) -> tuple[list[str], dict[str, str], str]:
    """The server's command line, environment and key.

    Raises:
        UserError: for a recipe without SGLang, without the vocabulary size, or without a key.
    """
    config = load_config(recipe, overrides)
    model, settings = config.policy.model, config.rollout.sglang
    if config.rollout.engine is not EngineName.sglang:
        raise UserError(
            "opo serve (OPO_ENGINE_NODES) needs an SGLang recipe, and rollout.engine is local; set "
            "rollout.engine=sglang"
        )
    if model.vocab_size is None:
        raise UserError("policy.model.vocab_size is null, and a server needs it; set it, or policy.init_from")
    python = str(interpreter(settings).absolute())
    check_options(settings)
    quantization = None
    if settings.fp8:  # importing torch takes seconds
        from opo_megatron.weights.fp8_folder import engine_quantization

        fp8 = engine_quantization(config, model.vocab_size)
        quantization = fp8.config if fp8 else None
    if settings.api_key is None and settings.api_key_file is None:
        raise UserError(
            "opo serve needs a key that the run has as well; add rollout.sglang.api_key_file=FILE to both "
            "commands (it is made), or set rollout.sglang.api_key='${oc.env:NAME_KEY}' in both"
        )
    folder = Path(tempfile.mkdtemp(prefix="opo-engine-"))
    write_model_config(config, model.vocab_size, folder, quantization)
    gpus = [str(i) for i in range(settings.tensor_parallel_size)]
    on_cpu = config.policy.device is Device.cpu
    server = Server(config, folder, folder / "log", f"{host}:{port}", None if on_cpu else gpus)
    return [python, str(SERVE), *server.arguments(port, host)], server.environment(), server.key


def _put_on_stdin(key: str) -> None:
    """Let the program that replaces this process read the key from its standard input."""
    read, write = os.pipe()
    os.write(write, f"{key}\n".encode())  # a pipe holds far more
    os.close(write)
    os.dup2(read, 0)
    os.close(read)
