"""Starts an SGLang server; run as a file by the interpreter of SGLang's own environment.

    <rollout.sglang.python> serve.py --model-path … [any option of sglang.launch_server]   < KEY
    <rollout.sglang.python> serve.py --check-options [options]    # describes the server's parser as JSON

It adds five things to `python -m sglang.launch_server`.  A server that a trainer started dies with it, even
if the trainer is killed; one of `opo serve` does not.  It reads its API key from standard input, because
other users can see command lines, and no request passes without it but those of `OPEN_PATHS`.  It sends
tokens as they are sampled (`token_channel.py`).  Without a GPU it provides stubs of operators that SGLang
imports but never calls there, and it lets SGLang record experts; SGLang's worker processes import this file
first, so they have both too.

Imports nothing from opo_megatron, which is not installed in that environment; `share_files` makes the files
importable that the server of exact mode shares with the trainer.
"""

import argparse
import ctypes
import hmac
import json
import os
import signal
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""What may be asked without the key: whether the server runs, and how much it does."""
KEYLESS = ("grpc_port", "grpc_mode", "smg_grpc_mode", "encoder_only", "use_ray", "sidecar")
"""Options of SGLang with which it listens in other ways, that ask for no key."""
EXPERTS_OPTION = "--enable-return-routed-experts"
KEYLESS_VARIABLES = ("SGLANG_GRPC_PORT", "SGLANG_RUST_SERVER")
PARENT, TOKEN_CHANNEL = "OPO_TRAINER_PID", "OPO_TOKEN_CHANNEL"
"""Variables that the trainer sets: its process id, and whether tokens are sent as they are sampled."""


def die_with_trainer() -> None:
    """Ask the kernel for SIGKILL when the trainer ends, for whatever reason; `opo serve` names none."""
    if (trainer := os.environ.get(PARENT)) is None:
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(trainer):  # it ended before the kernel was asked
        sys.exit("the trainer that started this server is gone")


def torchvision_has_operators() -> bool:
    """Whether torchvision's library defines them: the one from PyPI loads with CUDA builds of torch only."""
    import torch

    spec = find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))  # as torchvision does on import
    except OSError:
        return False
    return True


def stub_cpu_imports() -> None:
    """Stub the operators that SGLang imports but never calls on a CPU.

    Without a GPU it imports vllm's operators, whatever torch is built for (PyPI's torch is always a CUDA
    build).  The fake kernels that torchvision registers need their operators defined.
    """
    import torch

    if torch.cuda.is_available():
        return
    if not torchvision_has_operators():
        definitions = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            definitions.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        stub_cpu_imports.library = definitions  # type: ignore[attr-defined]  # undone when garbage collected

    def never(*args: object, **kwargs: object) -> None:
        raise RuntimeError("this operator has no CPU kernel")

    class Operators(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return never

    package, operators = types.ModuleType("vllm"), Operators("vllm._custom_ops")
    package.__path__ = []
    package._custom_ops = operators  # type: ignore[attr-defined]
    sys.modules |= {"vllm": package, "vllm._custom_ops": operators}


def record_experts_on_cpu() -> None:
    """Let a server without a GPU record experts: SGLang keeps them in memory that it pins by CUDA."""
    import torch

    if EXPERTS_OPTION not in sys.argv or torch.cuda.is_available():
        return
    try:
        from sglang.srt.mem_cache.pool_host import common

        allocators = common.ALLOC_MEMORY_FUNCS
    except (ImportError, AttributeError) as error:
        sys.exit(
            f"{EXPERTS_OPTION}: this SGLang has no sglang.srt.mem_cache.pool_host.common.ALLOC_MEMORY_FUNCS "
            f"({error}), by which a server without a GPU is made to record experts; install the version of "
            "`make setup-sglang`, or set rollout.routing_replay=false"
        )

    def without_pinning(dims: tuple[int, ...], dtype: torch.dtype, **_: object) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype)

    allocators["cpu"] = without_pinning


def share_files() -> None:
    """Make files of the trainer's package importable, without running the `__init__.py` of their packages."""
    root = Path(__file__).resolve().parents[2]
    if root.name in sys.modules:  # in the trainer's own process
        return
    for folder in ("", "config", "kernels", "rollout", "rollout/local", "rollout/sglang", "utils"):
        package = types.ModuleType(".".join((root.name, *Path(folder).parts)))
        package.__path__ = [str(root / folder)]
        sys.modules[package.__name__] = package


class Key(str):
    """A key that logs do not show: SGLang logs the representation of all its arguments."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'(hidden)'"


class KeyGate:
    """ASGI middleware that refuses what comes without the key: every method, path and protocol.

    SGLang's own check stays.  It lets pass websockets, the method OPTIONS and all paths that begin like an
    open one, among them /health_generate, which generates.
    """

    def __init__(self, app: Any, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_open(self, scope: dict[str, Any]) -> bool:
        # The path as it is routed: a URL put together from the request's headers may have another.
        return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in OPEN_PATHS

    def _has_key(self, scope: dict[str, Any]) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def serve() -> None:
    """Run the server until it ends."""
    key = Key(sys.stdin.readline().strip())
    if not key:
        sys.exit("serve.py takes the server's key from its standard input, and there is none")
    os.umask(0o077)  # SGLang's processes unpickle what they get through sockets in the temporary folder
    for name in KEYLESS_VARIABLES:
        os.environ.pop(name, None)
    from sglang.launch_server import run_server
    from sglang.srt.entrypoints import http_server
    from sglang.srt.server_args import prepare_server_args

    arguments = prepare_server_args(sys.argv[1:])
    for name in KEYLESS:
        if getattr(arguments, name, None):
            sys.exit(f"the option {name} of SGLang opens a port that asks for no key; remove it")
    arguments.api_key = key
    if TOKEN_CHANNEL in os.environ:
        from opo_megatron.rollout.sglang import token_channel

        token_channel.install(http_server, arguments)
    http_server.app.add_middleware(KeyGate, key=key)
    run_server(arguments)


def describe_parser(words: list[str]) -> dict[str, object]:
    """The options of the server's parser, each with all its names, and its objection to these words."""
    from sglang.srt.server_args import ServerArgs

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser, objection = Parser(add_help=False), None
    ServerArgs.add_cli_args(parser)
    try:
        parser.parse_args(["--model-path", "none", *words])
    except ValueError as error:
        objection = str(error)
    options = [action.option_strings for action in parser._actions]
    return {"options": options, "objection": objection}


stub_cpu_imports()
record_experts_on_cpu()
share_files()

if __name__ == "__main__":
    die_with_trainer()
    if sys.argv[1:2] == ["--check-options"]:
        print(json.dumps(describe_parser(sys.argv[2:])))
        sys.exit()
    serve()
