"""`opo doctor`: what is installed, what each missing part costs, and the command that installs it.

It imports none of the packages: versions come from the metadata of installed distributions, GPUs from
`nvidia-smi`, SGLang's environment from its own interpreter.  So it is fast, works where torch is broken or
missing, and needs only Python.

A finding is `ok`, `wrong` (not the version of `versions.toml`), `missing`, or `unused` (not useful on this
machine).  The exit code is 0 if all required parts are ok, else 2.  Required are the packages without which
nothing runs, and the parts that `--need` names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path

from opo_megatron.environment.versions import Part, Versions, numbers, read_versions
from opo_megatron.errors import EXIT_USER_ERROR

NEEDS = ("gpu", "fp8", "sglang")
"""Values of `--need`, in addition to names of packages."""
SGLANG_PYTHON = ".venv-sglang/bin/python"
_TIMEOUT_SECONDS = 20.0
_LIST_DISTRIBUTIONS = (
    "import json; from importlib.metadata import distributions; "
    "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version for d in distributions()}))"
)


@dataclass(frozen=True)
class Gpu:
    """One device, as `nvidia-smi` reports it."""

    name: str
    driver: str
    capability: str


@dataclass(frozen=True)
class Machine:
    """The state of this machine, before diagnosis."""

    python: str
    installed: dict[str, str]
    """Version by name of distribution, in lower case with hyphens."""
    path: tuple[str, ...] = ()
    """The module search path."""
    gpus: tuple[Gpu, ...] = ()
    sglang: dict[str, str] | None = None
    """`installed` of SGLang's environment; None where its interpreter does not run."""
    sglang_python: str = SGLANG_PYTHON

    def has_module(self, name: str) -> bool:
        return PathFinder.find_spec(name, list(self.path)) is not None


@dataclass(frozen=True)
class Finding:
    """The diagnosis of one part."""

    part: str
    state: str
    """ok | wrong | missing | unused"""
    required: bool
    found: str | None = None
    wanted: str = ""
    costs: str = ""
    fix: str = ""

    @property
    def is_fatal(self) -> bool:
        return self.required and self.state in ("wrong", "missing")


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return EXIT_USER_ERROR if any(finding.is_fatal for finding in self.findings) else 0


def collect(path: Sequence[str] | None = None, sglang_python: str = SGLANG_PYTHON) -> Machine:
    """Collect what is installed on this machine.

    Args:
        path: folders of packages; default this process's.
    """
    folders = list(sys.path if path is None else path)
    installed: dict[str, str] = {}
    for distribution in distributions(path=folders):
        name = distribution.metadata["Name"]
        if name:  # the first folder wins, as for imports; a broken distribution has no name
            installed.setdefault(_normal(name), distribution.version)
    return Machine(
        python=".".join(map(str, sys.version_info[:3])),
        installed=installed,
        path=tuple(folders),
        gpus=_gpus(),
        sglang=_query_sglang(sglang_python),
        sglang_python=sglang_python,
    )


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def _gpus() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ()  # no driver, so no usable GPU
    if result.returncode != 0:
        return ()
    rows = [line.split(", ") for line in result.stdout.strip().splitlines()]
    return tuple(Gpu(*row) for row in rows if len(row) == 3)


def _query_sglang(python: str) -> dict[str, str] | None:
    interpreter = Path(python).expanduser()
    if not interpreter.exists():
        return None
    try:
        result = subprocess.run(
            [str(interpreter.absolute()), "-c", _LIST_DISTRIBUTIONS],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env={},  # PYTHONPATH would add the trainer's packages
        )
        return dict(json.loads(result.stdout))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None


def diagnose(machine: Machine, versions: Versions, needs: Sequence[str] = ()) -> Report:
    """Compare every part of the set with the machine.

    Args:
        needs: values of NEEDS or names of packages that are required in addition.
    """
    report = Report([_python(machine, versions), *_gpu_findings(machine, versions, needs)])
    for part in versions.packages:
        required = part.needed == "always" or part.name in needs
        required |= part.name == "transformer-engine" and "fp8" in needs
        report.findings.append(_package(part, machine, required))
    report.findings += _sglang(machine, versions, "sglang" in needs)
    return report


def _python(machine: Machine, versions: Versions) -> Finding:
    at_least, below = versions.python
    fits = numbers(at_least) <= numbers(machine.python) < numbers(below)
    wanted = f"{at_least} or newer, below {below}"
    fix = f"make setup PYTHON=/path/to/python{versions.default_python}"
    state = "ok" if fits else "wrong"
    return Finding("python", state, True, machine.python, wanted, "nothing runs", fix)


def _gpu_findings(machine: Machine, versions: Versions, needs: Sequence[str]) -> list[Finding]:
    required = "gpu" in needs or "fp8" in needs
    if not machine.gpus:
        costs = "policies train on the CPU, for small models only"
        fix = "run on a machine where nvidia-smi lists GPUs"
        state = "missing" if required else "unused"
        return [Finding("gpu", state, required, None, "an NVIDIA GPU", costs, fix)]
    names = {gpu.name for gpu in machine.gpus}
    found = f"{len(machine.gpus)} × {', '.join(sorted(names))}"
    findings = [Finding("gpu", "ok", required, found, "an NVIDIA GPU")]
    driver, wanted = machine.gpus[0].driver, versions.cuda["driver_at_least"]
    fits = numbers(driver) >= numbers(wanted)
    findings.append(
        Finding(
            "driver",
            "ok" if fits else "wrong",
            required,
            driver,
            f"{wanted} or newer",
            "torch finds no GPU",
            f"install NVIDIA driver {wanted} or newer",
        )
    )
    return findings


def _package(part: Part, machine: Machine, required: bool) -> Finding:
    found = machine.installed.get(_normal(part.name))
    wanted, costs, fix = part.wanted, part.costs, part.fix
    replaced = part.useless_with is not None and _normal(part.useless_with) in machine.installed
    if part.needed == "gpu" and (replaced or not machine.gpus) and not required:
        return Finding(part.name, "unused", False, found, wanted)
    if part.git is not None:  # its version means nothing; its extension module counts
        assert part.module is not None
        if machine.has_module(part.module):
            return Finding(part.name, "ok", required, found or part.module, part.module)
        if found is not None:
            fix = f"pip uninstall -y {part.name}, then {fix}"
        return Finding(part.name, "missing", required, found, part.module, costs, fix)
    if found is None:
        return Finding(part.name, "missing", required, None, wanted, costs, fix)
    if not part.accepts(found):
        costs = "untested with the other versions of this set" + (f"; {part.why}" if part.why else "")
        return Finding(part.name, "wrong", required, found, wanted, costs, fix)
    if part.name == "torch" and machine.gpus and found.endswith("+cpu"):
        costs, fix = "this build has no CUDA", f"pip uninstall -y torch, then pip install {part.name}=="
        fix += f"{part.version} from an index with CUDA builds"
        return Finding(part.name, "wrong", required, found, f"a CUDA build of {part.version}", costs, fix)
    return Finding(part.name, "ok", required, found, wanted)


def _sglang(machine: Machine, versions: Versions, required: bool) -> list[Finding]:
    fix = "make setup-sglang" + (" SGLANG=cuda" if machine.gpus else "")
    if machine.sglang is None or "sglang" not in machine.sglang:
        where = f" in the environment of {machine.sglang_python}"
        part = versions.sglang[0]
        return [Finding(part.name, "missing", required, None, part.wanted + where, part.costs, fix)]
    findings = []
    for part in versions.sglang:
        found = machine.sglang.get(part.name)
        state = "missing" if found is None else "ok" if part.accepts(found) else "wrong"
        name = part.name if part.name == "sglang" else f"sglang's {part.name}"
        costs_and_fix = ("", "") if state == "ok" else (part.costs, fix)
        findings.append(Finding(name, state, required, found, part.wanted, *costs_and_fix))
    return findings


def describe(report: Report) -> str:
    """The report as text: a line per part, with cost and fix where it is missing or wrong."""
    width = max(len(finding.part) for finding in report.findings)
    lines = []
    for finding in report.findings:
        labels = {"ok": "ok", "wrong": "WRONG" if finding.required else "wrong", "unused": "–"}
        state = labels.get(finding.state, "MISSING" if finding.required else "missing")
        found = finding.found or ""
        wanted = f"  (wanted: {finding.wanted})" if finding.state in ("wrong", "missing") else ""
        lines.append(f"{finding.part:{width}}  {state:7}  {found}{wanted}".rstrip())
        if finding.state in ("wrong", "missing"):
            indent = " " * (width + 11)
            lines += [f"{indent}cost  {finding.costs}", f"{indent}fix   {finding.fix}"]
    fatal = [finding.part for finding in report.findings if finding.is_fatal]
    lines.append("")
    lines.append(f"not ready: {', '.join(fatal)}" if fatal else "ready; parts in lower case are optional")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `opo doctor`."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--need",
        metavar="PART",
        action="append",
        default=[],
        help=f"also required: {', '.join(NEEDS)} or a package; may be repeated",
    )
    parser.add_argument(
        "--sglang-python",
        metavar="PATH",
        default=SGLANG_PYTHON,
        help="interpreter of SGLang's environment, as in rollout.sglang.python",
    )


def run(options: argparse.Namespace) -> int:
    """Print the report; returns 0 if all required parts are ok, else 2."""
    versions = read_versions()
    names = (*NEEDS, *(part.name for part in versions.packages))
    for need in options.need:
        if need not in names:
            print(f"error: --need {need} is not known; choose one of {', '.join(names)}", file=sys.stderr)
            return EXIT_USER_ERROR
    report = diagnose(collect(sglang_python=options.sglang_python), versions, options.need)
    if options.json:
        ready = report.exit_code == 0
        print(json.dumps({"ready": ready, "findings": list(map(asdict, report.findings))}, indent=2))
    else:
        print(describe(report))
    return report.exit_code


def main(arguments: Sequence[str]) -> int:
    """`opo doctor` without the rest of `opo`, whose imports may be missing."""
    parser = argparse.ArgumentParser(
        prog="opo doctor", description="what is installed, what each missing part costs, how to install it"
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except SystemExit as error:
        return int(error.code or 0)
