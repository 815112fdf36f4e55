"""Writes the walk through the code in CONTRIBUTING.md, with the file and line of each stop.

    python tools/make_walk.py            # write
    python tools/make_walk.py --check    # exit code 1 if it is out of date

A stop is a function, class or method; its line is found by name: only the names below are kept by hand.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from opo_megatron.utils.terminal import prepare_terminal

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- walk: written by tools/make_walk.py -->", "<!-- end of walk -->"

WALKS: dict[str, tuple[str, ...]] = {
    "From the loop to the advantage": (
        "train.py opo_step",
        "updates/advantages.py set_advantages",
        "kernels/advantages.py compute_advantages",
        "algorithm/advantages.py compute_advantages",
    ),
    "From the loop to the weight stream": (
        "train.py opo_step",
        "rollout/generation.py Generation.synchronize",
        "policy/policy.py Policy.stream_weights",
    ),
    "From the loop to the weight mapping, which its docstring names": (
        "train.py opo_step",
        "weights/param_mapping.py parameters",
    ),
    "From the loop to the SGLang request": (
        "train.py opo_step",
        "updates/sample_batch.py sample_batch",
        "updates/sample_batch.py _sample_round",
        "rollout/generation.py Generation.generate",
        "rollout/sglang/engine.py SglangEngine.generate",
    ),
    "From `policy.train_step` to the loss": (
        "policy/policy.py Policy.train_step",
        "policy/policy.py Policy.accumulate_gradients",
        "policy/lm_head.py LMHeadLoss.forward",
        "kernels/lm_head.py chunked_logprobs",
        "policy/token_loss.py TokenLoss.__call__",
    ),
    "From `policy.fp8` in a recipe to the layers": (
        "config/schema.py PolicyConfig",
        "policy/model.py build_chunks",
        "policy/layer_specs.py fp8_fields",
    ),
    "From `policy.fp8` in a recipe to the engine": (
        "config/load.py resolve",
        "build.py _start_engine",
        "weights/fp8_folder.py engine_quantization",
        "rollout/sglang/engine.py SglangEngine._quantized",
    ),
}
"""Title → stops, each `FILE NAME`; from one stop to the next is one hop."""


def line_of(stop: str) -> tuple[str, int, str]:
    """(path in the repository, line, name) of a stop."""
    file, name = stop.split()
    path = ROOT / "opo_megatron" / file
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        inside = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
        if not inside:
            sys.exit(f"error: {path} has no {name}; correct WALKS in {Path(__file__).name}")
        node = inside[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return f"opo_megatron/{file}", node.lineno, name


def walk() -> str:
    """The section, in Markdown."""
    lines = [BEGIN, ""]
    for title, stops in WALKS.items():
        lines += [f"**{title}**", ""]
        for number, (path, line, name) in enumerate(map(line_of, stops)):
            lines.append(f"{number}. [`{path}:{line}`]({path}#L{line}) `{name}`")
        lines.append("")
    return "\n".join([*lines, END])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    written = before + walk() + after
    if check and written != page:
        print(f"error: {PAGE.name} is out of date; run: python tools/make_walk.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
