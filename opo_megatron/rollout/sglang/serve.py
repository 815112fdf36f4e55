"""Starts an SGLang server; run by the interpreter of SGLang's own environment, as a file.

    <rollout.sglang.python> serve.py --model-path … [any option of sglang.launch_server]

It adds two things to `python -m sglang.launch_server`.  The server dies with the trainer that started
it, also where that one is killed.  And where there is no GPU it lends SGLang names that it imports and
never calls there.  SGLang's worker processes import this file again before anything else, so both hold
for them too.

Imports nothing of opo_megatron, which that environment does not have.
"""

import ctypes
import os
import signal
import sys
import types
from importlib.util import find_spec
from pathlib import Path

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the process that started this one ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:
        sys.exit("the process that started this server is gone")


def torchvision_has_operators() -> bool:
    """Whether its own library defines them: that of PyPI's wheel loads beside CUDA builds of torch only."""
    import torch

    found = find_spec("torchvision")
    assert found is not None and found.origin is not None
    try:
        torch.ops.load_library(Path(found.origin).with_name("_C.so"))  # as torchvision is going to do
    except OSError:
        return False
    return True


def lend_cpu_names() -> None:
    """What SGLang imports and never calls on a CPU.

    It takes names from vllm's operators where it finds no GPU, whatever torch is built for: PyPI's torch
    is a CUDA build on every machine.  The fake kernels that torchvision registers need their operators.
    """
    import torch

    if torch.cuda.is_available():
        return
    if not torchvision_has_operators():
        definitions = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            definitions.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        lend_cpu_names.kept = definitions  # type: ignore[attr-defined]  # it is undone when collected

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


lend_cpu_names()

if __name__ == "__main__":
    die_with_parent()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
