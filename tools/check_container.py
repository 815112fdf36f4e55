"""Carries out the Dockerfile without Docker: its commands, in order, in a scratch folder.

    python tools/check_container.py                # everything: 20 minutes on two cores, 20 GB
    python tools/check_container.py --resume       # go on after the last step that worked
    python tools/check_container.py --list         # what would run

Paths of the image (/opt, /build) become folders of the scratch folder; ENV, ARG, WORKDIR and COPY mean what
they mean to Docker.  Left out, and recorded as such: the base image (this machine's Python 3.12, nvcc and g++
take its place, and CUDA's libraries come from torch's wheels), apt-get, and what is fetched with git from
outside the package registries.  Then both environments are imported.  Needs Python 3.12, nvcc 13.0 and g++,
but no GPU; writes records/container.json.  Exit code 1 where a step or an import failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.record import write_record

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "Dockerfile"
IMAGE_PATHS = re.compile(r"(?<![\w/.])/(opt|build)\b")
NOT_HERE = {
    "apt-get": "packages of the distribution; this machine's own are used",
    "git init": "fetches from outside the package registries",
}
LAST_LINES = 12

IMPORTS = {
    "trainer: torch, Transformer Engine and its torch extension": (
        "opo",
        "import torch, transformer_engine.pytorch as te, transformer_engine_torch as ext;"
        "print(torch.__version__, te.__name__, ext.__name__, torch.version.cuda)",
    ),
    "trainer: Megatron-Core with Transformer Engine's layers": (
        "opo",
        "from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear as a;"
        "from megatron.core.models.gpt import gpt_layer_specs as b; import megatron.core;"
        "layer = b.get_gpt_layer_with_transformer_engine_spec();"
        "print(megatron.core.__version__, a.__name__, layer.module.__name__)",
    ),
    "trainer: opo_megatron's own layer specs": (
        "opo",
        "import opo_megatron.policy.layer_specs, opo_megatron.kernels.triton_softmax; print('imported')",
    ),
    "SGLang: the server's modules": (
        "sglang",
        "import torch, sglang, sglang.srt.server_args, sglang.srt.entrypoints.http_server;"
        "print(sglang.__version__, torch.__version__, torch.version.cuda)",
    ),
    "SGLang: the memory saver": ("sglang", "import torch_memory_saver; print(torch_memory_saver.__name__)"),
}


@dataclass
class Image:
    """What Docker would hold while it builds."""

    scratch: Path
    jobs: int
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    workdir: Path = Path("/")

    def __post_init__(self) -> None:
        self.scratch.mkdir(parents=True, exist_ok=True)
        for name in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"):
            self.environment.pop(name, None)

    def moved(self, text: str) -> str:
        """The text with the image's paths inside the scratch folder."""
        return IMAGE_PATHS.sub(lambda match: f"{self.scratch}/{match[1]}", text)

    def set(self, assignments: str) -> None:
        """ENV and ARG: NAME=VALUE …, of which ARG BUILD_JOBS is this command's --jobs."""
        for word in shlex.split(self.moved(assignments)):
            name, _, value = word.partition("=")
            value = re.sub(r"\$\{?(\w+)\}?", lambda match: self.environment.get(match[1], ""), value)
            self.environment[name] = str(self.jobs) if name == "BUILD_JOBS" else value

    def copy(self, arguments: str) -> None:
        """COPY of files into a folder, flat as Docker does it; `COPY .` is the tracked files."""
        *sources, target = shlex.split(self.moved(arguments))
        folder = self.workdir / target
        folder.mkdir(parents=True, exist_ok=True)
        if sources == ["."]:
            archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
            subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
            return
        for source in sources:
            shutil.copy(ROOT / source, folder)

    def use_headers_of_torch(self) -> None:
        """cuDNN's and NCCL's headers, which the base image has in /usr/include."""
        found = sorted(self.scratch.glob("opt/opo/lib/python3*/site-packages/nvidia/*/include"))
        self.environment["CPATH"] = ":".join(map(str, found))
        self.environment.setdefault("CUDA_HOME", "/usr/local/cuda")

    def run(self, command: str, log: Path) -> int:
        """RUN: the exit code; the output goes to `log`."""
        self.use_headers_of_torch()
        self.workdir.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            words = ["bash", "-o", "pipefail", "-c", self.moved(command)]
            return subprocess.run(
                words, cwd=self.workdir, env=self.environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(INSTRUCTION, arguments) of a Dockerfile; comments are dropped and continued lines joined."""
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, arguments = line.partition(" ")
        yield name, " ".join(arguments.split())


def reason_to_leave_out(command: str) -> str | None:
    return next((reason for begin, reason in NOT_HERE.items() if command.startswith(begin)), None)


def carry_out(image: Image, resume: bool) -> list[dict[str, Any]]:
    """Every instruction in order, until a RUN fails; one entry per RUN."""
    steps: list[dict[str, Any]] = []
    for name, arguments in instructions(DOCKERFILE.read_text()):
        if name in ("ENV", "ARG"):
            image.set(arguments)
        elif name == "WORKDIR":
            image.workdir = Path(image.moved(arguments))
            image.workdir.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            image.copy(arguments)
        elif name == "RUN":
            steps.append(run_step(image, arguments, resume))
            print(
                f"{steps[-1].get('seconds', 0):6.0f} s  {steps[-1]['result']:>12}  {arguments[:90]}",
                flush=True,
            )
            if steps[-1]["result"] == "failed":
                break
    return steps


def run_step(image: Image, command: str, resume: bool) -> dict[str, Any]:
    """One RUN; its result is kept beside its log, so that --resume need not repeat it."""
    name = "step_" + hashlib.sha256(command.encode()).hexdigest()[:8]
    if reason := reason_to_leave_out(command):
        return {"command": command, "result": f"left out: {reason}"}
    log, done = image.scratch / f"{name}.log", image.scratch / f"{name}.json"
    if resume and done.exists():
        kept: dict[str, Any] = json.loads(done.read_text())
        return kept
    started = time.monotonic()
    code = image.run(command, log)
    step: dict[str, Any] = {"command": command, "result": "failed" if code else "ok"}
    step["seconds"] = round(time.monotonic() - started)
    if code:
        return step | {"last lines": last_lines(image, log.read_text(errors="replace"))}
    done.write_text(json.dumps(step))
    return step


def last_lines(image: Image, text: str) -> list[str]:
    """The end of an output, without the scratch folder's path."""
    return text.replace(str(image.scratch), "").strip().splitlines()[-LAST_LINES:]


def check_imports(image: Image) -> dict[str, dict[str, Any]]:
    """What each environment says when its parts are imported."""
    results: dict[str, dict[str, Any]] = {}
    for name, (environment, code) in IMPORTS.items():
        python = image.scratch / "opt" / environment / "bin" / "python"
        done = subprocess.run(
            [str(python), "-c", code],
            env=image.environment,
            cwd=image.scratch,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            results[name] = {"result": "ok", "output": last_lines(image, done.stdout)[-1]}
        else:
            results[name] = {"result": "failed", "last lines": last_lines(image, done.stderr)}
        print(f"{results[name]['result']:>8}  {name}", flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir(), "opo_container"),
        help="folder for both environments (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at the same time")
    parser.add_argument("--resume", action="store_true", help="keep the steps that worked before")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    if options.list:
        for name, arguments in instructions(DOCKERFILE.read_text()):
            reason = reason_to_leave_out(arguments) if name == "RUN" else None
            print(name, arguments, f"   # left out: {reason}" if reason else "")
        return 0
    if options.scratch.exists() and any(options.scratch.iterdir()) and not options.resume:
        parser.error(f"{options.scratch} is not empty; remove it, name another --scratch, or --resume")
    image = Image(options.scratch.resolve(), options.jobs)
    steps = carry_out(image, options.resume)
    results: dict[str, Any] = {"steps": steps}
    if all(step["result"] != "failed" for step in steps):
        results["imports"] = check_imports(image)
    print(f"written to {write_record('container', results)}")
    failed = [step["result"] for step in [*steps, *results.get("imports", {}).values()]].count("failed")
    return 1 if failed or "imports" not in results else 0


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
