"""Proposals of `opo plan --best` as a table, a recipe's difference, and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from opo_megatron.plan.best import COUNT, MARGIN, Layout, Proposal, describe, difference
from opo_megatron.plan.plan import Job
from opo_megatron.plan.show import GB, new_table

WORTH = 0.05
"""Predicted gain below which a change of layout is not worth making."""


def show_best(present: Proposal, found: Sequence[Proposal], console: Console) -> None:
    """Print the recipe's own layout, the proposals, and the first one's difference to the recipe."""
    job = present.plan.job
    table = new_table(
        f"The {len(found)} fastest layouts on {job.gpus} × {job.gpu.name.upper()}, s per step",
        "layout", "step", "generation", "training", "sync", "peak GB", "limited by",
    )  # fmt: skip
    for name, one in (("recipe: ", present), *(("", one) for one in found)):
        times = one.plan.times
        seconds = (times.step, times.generation, times.training, times.sync)
        problem = one.plan.problem
        table.add_row(
            name + describe(one.layout), *(f"{value:.3g}" for value in seconds), f"{one.peak / GB:.1f}",
            "does not fit" if problem is not None else one.limits,
        )  # fmt: skip
    console.print(table)
    if not found:
        return
    best = found[0]
    gain = present.plan.times.step / best.plan.times.step - 1
    console.print(
        f"Bytes are counted, and leave {MARGIN:.0%} of the memory free; times are modelled.",
        markup=False,
    )
    if present.plan.problem is None and gain < WORTH:
        console.print(f"The recipe is within {WORTH:.0%} of the fastest: leave it.", markup=False)
        return
    console.print("The fastest, as a change of the recipe:\n", markup=False)
    console.print(recipe_difference(best.layout, job), markup=False)


def recipe_difference(layout: Layout, job: Job) -> str:
    """Lines for a recipe, each with the value that it replaces."""
    lines: list[str] = []
    last: list[str] = []
    for key, (old, new) in difference(layout, job).items():
        *path, name = key.split(".")
        common = next((i for i, (a, b) in enumerate(zip(path, last, strict=False)) if a != b), len(path))
        common = min(common, len(last))
        lines += [f"{'  ' * i}{path[i]}:" for i in range(common, len(path))]
        lines.append(f"{'  ' * len(path)}{name}: {_text(new)}  # {_text(old)}")
        last = path
    return "\n".join(lines)


def _text(value: object) -> str:
    value = getattr(value, "value", value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def best_to_json(present: Proposal, found: Sequence[Proposal]) -> dict[str, Any]:
    """The recipe's layout and the proposals, in bytes and seconds."""
    return {"recipe": _row(present), "proposals": [_row(one) for one in found], "at most": COUNT}


def _row(one: Proposal) -> dict[str, Any]:
    times = one.plan.times
    return {
        "layout": {key: getattr(value, "value", value) for key, value in one.layout.settings().items()},
        "step": times.step, "generation": times.generation, "training": times.training, "sync": times.sync,
        "peak": one.peak, "problem": one.plan.problem, "limits": one.limits,
    }  # fmt: skip
