"""Writes the tables of docs/objectives.md from the table of objectives.

python tools/make_objectives.py            # writes docs/objectives.md
python tools/make_objectives.py --check    # exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from opo_megatron.algorithm.config import AlgorithmConfig, ObjectiveName
from opo_megatron.algorithm.objectives.table import SPECS, ObjectiveSpec, passes_of
from opo_megatron.utils.terminal import prepare_terminal

TARGET = Path(__file__).parents[1] / "docs" / "objectives.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(argv)
    before = TARGET.read_text(encoding="utf-8")
    text = between(between(before, "table", table()), "options", option_table())
    if not options.check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if text == before:
        return 0
    print(f"error: {TARGET} is out of date; run: python tools/make_objectives.py", file=sys.stderr)
    return 1


def between(text: str, name: str, lines: list[str]) -> str:
    """`text` with `lines` between the two marks of `name`."""
    first, last = f"<!-- {name}: written by tools/make_objectives.py -->", f"<!-- end of {name} -->"
    pattern = re.escape(first) + r".*?" + re.escape(last)
    found = "\n".join([first, "", *lines, "", last])
    return re.sub(pattern, lambda _: found, text, count=1, flags=re.DOTALL)


def table() -> list[str]:
    head = ["| objective | formula | passes | columns | from |", "|---|---|---|---|---|"]
    return head + [_row(name, spec) for name, spec in SPECS.items()]


def _row(name: ObjectiveName, spec: ObjectiveSpec) -> str:
    passes = passes_of(AlgorithmConfig(objective=name))
    takes = [word for word, is_taken in zip(passes._fields, passes, strict=True) if is_taken]
    columns = ", ".join(f"`{column}`" for column in spec.inputs)
    if spec.derived_over is not None:
        columns += f"; over a {spec.derived_over.value}: " + ", ".join(f"`{c}`" for c in spec.derived)
    cells = (f"`{name.value}`", spec.formula, ", ".join(takes) or "–", columns, spec.source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def option_table() -> list[str]:
    rows = [
        f"| `{name.value}` | `{key}` | {'required' if option.default is None else f'{option.default:g}'} "
        f"| {option.allowed} | {option.meaning} |"
        for name, spec in SPECS.items()
        for key, option in spec.options.items()
    ]
    return ["| objective | option | default | allowed | meaning |", "|---|---|---|---|---|", *rows]


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
