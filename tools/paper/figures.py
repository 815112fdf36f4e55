"""Figures of the paper's comparison: curves with bands over seeds, and a table of claims and verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paper.claims import NO_DIFFERENCE, OPPOSITE, REPRODUCED, Finding, Interval

from opo_megatron.report.arms import Arm, band
from opo_megatron.report.figures import STYLE, draw_band
from opo_megatron.report.runs import Run
from opo_megatron.utils.extras import require_extra

MEASURES = {
    "eval/accuracy": "held-out accuracy",
    "entropy": "entropy of training samples, nats per token",
    "eval/kl": "KL to the initial weights, nats per held-out token",
    "eval/response_length/mean": "tokens per held-out response",
}
COLOURS = {REPRODUCED: "#CDE8DC", OPPOSITE: "#F6CFB8", NO_DIFFERENCE: "#F1F1F1"}
OTHER_COLOUR = "#FFFFFF"
WIDTH_OF_CLAIM = 104


def load_pyplot() -> Any:
    """matplotlib.pyplot with the file backend.

    Raises:
        UserError: where matplotlib is not installed.
    """
    matplotlib = require_extra("matplotlib", "tools/reproduce_paper.py", "report")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_curves(runs: dict[str, list[Run]], title: str, path: Path) -> Path:
    """Four panels; per arm the mean over seeds, with a band from the minimum to the maximum."""
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10, 7.2))
        for axes, (metric, label) in zip(panels.flat, MEASURES.items(), strict=True):
            for index, (name, arm_runs) in enumerate(runs.items()):
                curve = band(Arm(name, arm_runs), metric)
                if curve is not None:
                    draw_band(axes, index, curve).set_label(name)
            axes.set(title=label, xlabel="step")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        figure.suptitle(title)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path


def plot_claims(findings: Sequence[Finding], title: str, path: Path) -> Path:
    """A table: claim, difference with its 95 % interval, verdict."""
    plt = load_pyplot()
    rows = [
        ("\n".join(textwrap.wrap(f.claim.text, WIDTH_OF_CLAIM)), interval_text(f.difference), verdict_text(f))
        for f in findings
    ]
    with plt.rc_context(STYLE):
        lines = sum(1 + row[0].count("\n") for row in rows)
        figure = plt.figure(figsize=(12.5, 0.9 + 0.25 * lines))
        axes = figure.add_subplot()
        axes.axis("off")
        axes.set_title(title, loc="left")
        table = axes.table(
            cellText=rows,
            colLabels=("claim", "difference [95 % interval]", "verdict"),
            colWidths=(0.56, 0.22, 0.22),
            cellLoc="left",
            loc="upper center",
        )
        table.auto_set_font_size(False)
        table.set_fontsize(8)
        for (row, _), cell in table.get_celld().items():
            cell.set_edgecolor("#CCCCCC")
            height = 1 + (rows[row - 1][0].count("\n") if row else 0)
            cell.set_height(height / (lines + 2))
            cell.set_facecolor(_colour(findings[row - 1]) if row else "#E4E4E4")
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return path


def verdict_text(finding: Finding) -> str:
    """The verdict, which only the paper's claims have."""
    return finding.verdict if finding.claim.by_the_paper else "(not a claim of the paper)"


def _colour(finding: Finding) -> str:
    return COLOURS.get(finding.verdict, OTHER_COLOUR) if finding.claim.by_the_paper else OTHER_COLOUR


def interval_text(difference: Interval | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
