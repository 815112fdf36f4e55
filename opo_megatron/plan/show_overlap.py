"""The simulated steps of a plan with engines on nodes of their own, as a table."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from opo_megatron.plan.overlap import lengths_of_run, splits, together
from opo_megatron.plan.plan import RunPlan

ROWS = 5


def show_overlap(plan: RunPlan, lengths: Path | None, console: Console) -> None:
    """Print the fastest divisions of the GPUs, beside all GPUs for both phases in turn."""
    responses = None if lengths is None else lengths_of_run(lengths)
    found = splits(plan, responses)
    table = Table(
        title="Generation and training, s", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    headings = ("GPUs that serve", "that train", "in turn", "overlapped", "training hidden")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    both = together(plan.work)
    table.add_row("all", "all", f"{both:.3g}", "", "")
    for one in found[:ROWS]:
        step, tail = one.overlapped.step, one.overlapped.step - one.overlapped.generation
        hidden = 1 - tail / one.overlapped.training
        table.add_row(str(one.serving), str(one.training), f"{one.apart:.3g}", f"{step:.3g}", f"{hidden:.0%}")
    console.print(table)
    if not found:
        console.print("No division by whole nodes leaves the trainer whole model replicas.", markup=False)
        return
    best = found[0]
    words = (
        f"Let {best.serving} GPUs serve: rollout.overlap=true with rollout.sglang.urls takes "
        f"{best.overlapped.step / both:.2f} of the time"
        if best.overlapped.step < both
        else "All GPUs in turn are faster than any division"
    )
    source = "log-normal lengths" if lengths is None else f"the lengths in {lengths}"
    console.print(f"{words}, for {source}; weight sync and what is fitted are left out.", markup=False)
