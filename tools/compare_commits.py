"""Checks that two commits compute the same, bit for bit; for refactorings.

    python tools/compare_commits.py OLD               # OLD against the working tree
    python tools/compare_commits.py OLD NEW           # two commits
    python tools/compare_commits.py OLD NEW tp2 moe-ep2   # some of the cases
    python tools/compare_commits.py HEAD --python OTHER   # this interpreter against another

Both trees train short runs of the quickstart recipe, one per case below, on this machine, each tree on
`PYTHONPATH`: OLD with this interpreter, NEW with it or with that of --python.  Compared bit for bit: every
line of `audit.jsonl` (digests of rollouts and weights) and every metric of `metrics.jsonl` and
`warm_start.jsonl` outside time/, memory/, throughput/ and run/.  Exit code 1 where anything differs, or where
no step of a case had a gradient, so that the case proves nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from rich.console import Console
from rich.table import Table

from opo_megatron.config.rules.resilience import VOLATILE
from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).resolve().parent.parent
WORKING_TREE = "the working tree"
FILES = ("audit.jsonl", "metrics.jsonl", "warm_start.jsonl")

SHORT = (
    "warm_start.steps=150",
    "train.steps=6",
    "eval.every_steps=3",
    "eval.problems=64",
    "checkpoint.every_steps=3",
    "rollout.prompts_per_step=16",
)
TP2, PP2 = "policy.tensor_model_parallel_size=2", "policy.pipeline_model_parallel_size=2"
FOUR_LAYERS = "policy.model.num_layers=4"
MOE = ("policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=96")
CLIPPED = ("algorithm.objective=clipped", "algorithm.updates_per_batch=2", "algorithm.kl_coefficient=0.1")


@dataclass(frozen=True)
class Case:
    """One or two commands that write one run folder."""

    ranks: int = 1
    overrides: tuple[str, ...] = ()
    first: tuple[str, ...] | None = None
    """Overrides of a first command, whose run the second one resumes."""


@dataclass(frozen=True)
class Tree:
    """The files of a commit, and the interpreter that runs them."""

    folder: Path
    python: str


CASES = {
    "quickstart": Case(),
    "tp2": Case(2, (TP2,)),
    "pp2vpp2": Case(2, (PP2, FOUR_LAYERS, "policy.virtual_pipeline_model_parallel_size=2")),
    "dp2": Case(2),
    "moe-ep2": Case(2, ("policy.expert_model_parallel_size=2", *MOE)),
    "thd": Case(1, ("policy.packing=thd",)),
    "auto": Case(1, ("algorithm.baseline=auto", "algorithm.variance_every=2")),
    "clipped": Case(1, CLIPPED),
    "exact": Case(1, ("rollout.local.exact=true", "on_policy.tolerance=0")),
    "resumed": Case(1, ("resume=auto",), first=("train.steps=3",)),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD", help="commit to compare with")
    parser.add_argument(
        "new", metavar="NEW", nargs="?", default=None, help="commit (default: the working tree)"
    )
    parser.add_argument("cases", nargs="*", help=f"any of: {', '.join(CASES)} (default: all)")
    parser.add_argument("--out", type=Path, help="keep the runs of both trees in this folder")
    parser.add_argument("--python", default=sys.executable, help="interpreter of NEW (default: this one)")
    arguments = parser.parse_args()
    new, cases = arguments.new, arguments.cases
    if new in CASES:
        new, cases = None, [new, *cases]
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    with (
        tempfile.TemporaryDirectory() as temporary,
        checkout(arguments.old) as old_tree,
        checkout(new) as new_tree,
    ):
        trees = {"old": Tree(old_tree, sys.executable), "new": Tree(new_tree, arguments.python)}
        return compare(trees, cases or list(CASES), arguments.out or Path(temporary))


@contextmanager
def checkout(commit: str | None) -> Iterator[Path]:
    """A worktree of the commit; None is the working tree."""
    if commit is None:
        yield ROOT
        return
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        try:
            subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        except subprocess.CalledProcessError:
            sys.exit(f"error: {commit!r} is not a commit of {ROOT}; `git log` lists them")
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def compare(trees: dict[str, Tree], names: list[str], out: Path) -> int:
    """Run the cases under both trees and print the table."""
    table = Table(title="bit for bit")
    for heading in ("case", "lines", "values", "largest gradient norm", ""):
        table.add_column(heading)
    failures = 0
    for name in names:
        print(f"{name} …", flush=True)
        folders = [out / which / name for which in trees]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, [CASES[name]] * 2, trees.values(), folders))
        differences, lines, values = differences_of(*folders)
        norm = max(row.get("grad_norm", 0.0) for row in read(folders[0] / "metrics.jsonl"))
        verdict = differences[0] if differences else "equal" if norm > 0 else "no step had a gradient"
        failures += verdict != "equal"
        table.add_row(name, str(lines), str(values), f"{norm:.3g}", verdict)
    Console(width=140).print(table)
    return 1 if failures else 0


def run(case: Case, tree: Tree, folder: Path) -> None:
    """Train one case in `folder` with the package of `tree`."""
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(tree.folder), "OMP_NUM_THREADS": "1"}
    recipe = tree.folder / "recipes" / "quickstart.yaml"
    command = [tree.python, "-m", "opo_megatron", "train", str(recipe)]
    command += ["run.dir=run", *SHORT, *(["--nproc", str(case.ranks)] if case.ranks > 1 else [])]
    attempts = [case.overrides] if case.first is None else [case.first, case.overrides]
    for overrides in attempts:
        with (folder / "log.txt").open("a") as log:
            done = subprocess.run(
                [*command, *overrides], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        if done.returncode:
            text = Path(log.name).read_text()[-3000:]
            sys.exit(f"error: {tree.folder} with {tree.python} failed with {' '.join(overrides)}:\n{text}")
    for name in FILES:
        if (folder / "run" / name).exists():
            (folder / "run" / name).rename(folder / name)


def differences_of(old: Path, new: Path) -> tuple[list[str], int, int]:
    """Descriptions of all differences; the number of lines and of values compared."""
    differences, lines, values = [], 0, 0
    for name in FILES:
        for number, rows in enumerate(zip_longest(read(old / name), read(new / name)), 1):
            if None in rows:
                differences.append(f"{name} has a different number of lines")
                break
            before, after = ({k: v for k, v in row.items() if not k.startswith(VOLATILE)} for row in rows)
            lines, values = lines + 1, values + len(before)
            names = [key for key in before | after if before.get(key) != after.get(key)]
            differences += [f"{name}:{number} {key}: {before.get(key)} → {after.get(key)}" for key in names]
    return differences, lines, values


def read(path: Path) -> list[dict]:
    """Rows of a JSON Lines file; none where it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
