"""Starts an SGLang server; run as a file by the interpreter of SGLang's own environment.

    <rollout.sglang.python> serve.py --model-path … [any option of sglang.launch_server]
    <rollout.sglang.python> serve.py --check-options [options]    # describes the server's parser as JSON

It adds two things to `python -m sglang.launch_server`.  The server dies with the trainer that started it,
even if the trainer is killed.  And without a GPU it provides stubs of operators that SGLang imports but never
calls there.  SGLang's worker processes import this file first, so they have the stubs too.

Imports nothing from opo_megatron, which is not installed in that environment.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent process ends, for whatever reason."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the process that started this server is gone")


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

if __name__ == "__main__":
    die_with_parent()
    if sys.argv[1:2] == ["--check-options"]:
        print(json.dumps(describe_parser(sys.argv[2:])))
        sys.exit()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
