"""`opo serve`: an SGLang server for a recipe's model, for `rollout.sglang.urls` of a run on other nodes."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
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
  opo serve my.yaml --port 10123
      then, on the training nodes:
      rollout.sglang.urls=[http://HOST:10123] rollout.sglang.transport=distributed

The server starts with dummy weights, like a run's own, on the node's first
rollout.sglang.tensor_parallel_size GPUs; the run sends its weights before every step.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo serve`."""
    add_recipe(parser)
    add_debug(parser)
    parser.add_argument(
        "--port", metavar="N", type=count_of("a port"), required=True, help="port that the server listens on"
    )


def run(options: argparse.Namespace) -> int:
    """Replace this process by the server."""
    command, environment = server_command(options.recipe, options.overrides, options.port)
    os.execve(command[0], command, environment)


def server_command(recipe: str, overrides: Sequence[str], port: int) -> tuple[list[str], dict[str, str]]:
    """The server's command line and environment.

    Raises:
        UserError: for a recipe without SGLang, or without the vocabulary size.
    """
    config = load_config(recipe, overrides)
    model = config.policy.model
    if config.rollout.engine is not EngineName.sglang:
        raise UserError(
            "opo serve (OPO_ENGINE_NODES) needs an SGLang recipe, and rollout.engine is local; set "
            "rollout.engine=sglang"
        )
    if model.vocab_size is None:
        raise UserError("policy.model.vocab_size is null, and a server needs it; set it, or policy.init_from")
    python = str(interpreter(config.rollout.sglang).absolute())
    check_options(config.rollout.sglang)
    quantization = None
    if config.rollout.sglang.fp8:  # importing torch takes seconds
        from opo_megatron.weights.fp8_folder import engine_quantization

        fp8 = engine_quantization(config, model.vocab_size)
        quantization = fp8.config if fp8 else None
    folder = Path(tempfile.mkdtemp(prefix="opo-engine-"))
    write_model_config(config, model.vocab_size, folder, quantization)
    gpus = [str(i) for i in range(config.rollout.sglang.tensor_parallel_size)]
    on_cpu = config.policy.device is Device.cpu
    server = Server(config, folder, folder / "log", "external", None if on_cpu else gpus)
    arguments = [*server.arguments(port), "--host", "0.0.0.0"]  # the last one wins
    return [python, str(SERVE), *arguments], server.environment()
