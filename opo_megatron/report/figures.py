"""The figures, by matplotlib: the page embeds them as SVG, `--png` writes the same ones as pictures.

Arms have the colours of Okabe and Ito, which colour-blind people can distinguish, and different line styles,
for prints without colour.  Text is rendered as outlines: a page looks the same everywhere, and nothing in a
name (a `$`, a `<`) is read as markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any

from opo_megatron.observe.gradient_noise import UNBIASED, Noise, noise_intervals, variance_reports
from opo_megatron.observe.metrics_file import MetricsRow
from opo_megatron.observe.step_timeline import ENDED
from opo_megatron.report.arms import Arm, Band, band, bin_size
from opo_megatron.report.measures import Measure, sections_of
from opo_megatron.report.runs import Run
from opo_megatron.report.timeline import ENGINE, TRAINER, bars_of
from opo_megatron.utils.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v")
PHASES = {
    "rollout": "#0072B2", "reward": "#E69F00", "variance": "#CC79A7", "train": "#D55E00", "tail": "#F0A070",
    "sync": "#009E73", "eval": "#56B4E9", "audit": "#999999",
}  # fmt: skip
OTHER = "#DDDDDD"
INTERVALS = PHASES | {"engine": "#0072B2", "update": "#882E00", "lost": "#DDDDDD"}
"""Colours of a timeline."""
SHOWN_RANKS = 16
"""At most, in a timeline."""
SHOWN_ENDS = 400
"""Places on a timeline that can show that a response has ended."""
FEW_POINTS = 30
"""Curves of at most this many points have markers."""
LONGEST_NAME = 40
"""Names in legends are shortened to this many characters."""
TWO_COLUMNS = 30
"""Legends whose names have at most this many characters have two columns."""
STYLE = {
    "font.size": 9.0, "axes.titlesize": 10.0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8.0, "svg.fonttype": "path", "svg.hashsalt": "opo",
    "text.parse_math": False, "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One figure in both formats."""

    name: str
    """Name of its file."""
    section: str
    title: str
    caption: str
    svg: str
    png: bytes | None
    """None without `--png`."""


def figures_of(arms: Sequence[Arm], with_png: bool, show: Callable[[str, float], None]) -> list[Figure]:
    """All figures: one per metric, then the gradient's noise by baseline, the time by phase, and timelines.

    Args:
        with_png: also as pictures, which doubles the time.
        show: called with the current work and the fraction done (0 to 1).

    Raises:
        UserError: where matplotlib is missing.
    """
    matplotlib = require_extra("matplotlib", "opo report", "report")
    matplotlib.use("Agg")
    figures: list[Figure] = []
    sections = sections_of(arms)
    total = sum(map(len, sections.values())) + 1
    with matplotlib.rc_context(STYLE):
        for section, measures in sections.items():
            for measure in measures:
                show(f"plotting {measure.title}", len(figures) / total)
                figures.append(_curve_figure(section, measure, arms, with_png))
        noise = {arm.title: noise_of(arm) for arm in arms}
        if any(noise.values()):
            figures.append(_noise_figure(noise, with_png))
        runs = [run for arm in arms for run in arm.runs]
        if any(phases_of(run) for run in runs):
            figures.append(_time_figure(runs, with_png))
        figures += [_timeline_figure(run, run.timeline, with_png) for run in runs if run.timeline]
    return figures


def _curve_figure(section: str, measure: Measure, arms: Sequence[Arm], with_png: bool) -> Figure:
    from matplotlib import ticker

    rows = math.ceil(len(arms) / _columns([_shortened(arm.title) for arm in arms]))
    with _canvas(4.6, 3.25 + 0.16 * rows) as canvas:
        axes = canvas.subplots()
        curves = [(index, arm, band(arm, measure.metric)) for index, arm in enumerate(arms)]
        plotted = [(index, arm, curve) for index, arm, curve in curves if curve is not None]
        bands = [curve for _, _, curve in plotted]
        lines = [draw_band(axes, index, curve) for index, _, curve in plotted]
        axes.set(title=measure.title, xlabel="OPO step", ylabel=measure.unit)
        axes.title.set_fontweight("bold")
        if measure.logarithmic and _spans_decades(bands):
            axes.set_yscale("log")
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter(ticker.LogFormatter())  # the default writes TeX
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        has_band = any(curve.runs > 1 for curve in bands)
        _legend(canvas, lines, [_shortened(arm.title) for _, arm, _ in plotted], has_band)
        size = max(bin_size(len(run.series(measure.metric))) for arm in arms for run in arm.runs)
        binned = f"  A point covers up to {size} steps." if size > 1 else ""
        caption = measure.meaning + binned
        svg, png = _render(canvas, with_png)
    return _figure(measure.metric.replace("/", "_"), section, measure.title, caption, svg, png)


def _spans_decades(bands: Sequence[Band]) -> bool:
    """Whether all values are positive and span a factor of ten or more."""
    low = min((float(curve.low.min()) for curve in bands if len(curve.low)), default=0.0)
    high = max((float(curve.high.max()) for curve in bands if len(curve.high)), default=0.0)
    return low > 0 and high >= 10 * low


def draw_band(axes: Axes, index: int, curve: Band) -> Line2D:
    """Plot an arm's line over its band; `index` selects colour, dashes and marker."""
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
    marker = MARKERS[index % len(MARKERS)] if len(curve.steps) <= FEW_POINTS else None
    if curve.runs > 1 and len(curve.steps):
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    for steps, values in curve.tails:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.8)
    (line,) = axes.plot(
        curve.steps, curve.mean, color=colour, linestyle=dashes, linewidth=1.6, marker=marker, markersize=3.2
    )
    return line


def _legend(canvas: Canvas, lines: Sequence[Line2D], names: Sequence[str], has_band: bool) -> None:
    """A legend below the figure; with a band, its title explains the band."""
    title = "line: mean of the runs; band: lowest to highest" if has_band else None
    canvas.legend(
        lines, names, loc="outside lower center", ncols=_columns(names), title=title, title_fontsize=7.5
    )


def _columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names)) <= TWO_COLUMNS and len(names) > 1 else 1


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def phases_of(run: Run) -> dict[str, float]:
    """Mean seconds per OPO step by phase; the rest is `other`.

    Where a step overlaps with generation, `rollout` ends with the last response and `tail` is what follows.
    """
    steps = [row for row in run.rows if row.get("time/step")]
    if not steps:
        return {}
    names = dict.fromkeys(name for row in steps for name in row if name.startswith("time/"))
    seconds = {
        name.removeprefix("time/"): sum(row.get(name) or 0.0 for row in steps) / len(steps) for name in names
    }
    whole = seconds.pop("step")
    if "tail" in seconds:
        del seconds["train"]  # which is partly during `rollout`
    # The audit is not part of time/step.
    inside = sum(value for name, value in seconds.items() if name != "audit")
    ordered = sorted(seconds, key=lambda name: [*PHASES, name].index(name))
    return {name: seconds[name] for name in ordered} | {"other": max(0.0, whole - inside)}


def _time_figure(runs: Sequence[Run], with_png: bool) -> Figure:
    with _canvas(9.4, 1.3 + 0.34 * len(runs)) as canvas:
        axes = canvas.subplots()
        bars = [phases_of(run) for run in runs]
        names = dict.fromkeys(name for bar in bars for name in bar if name != "other")
        for name in (*names, "other"):
            lefts = [_before(bar, name) for bar in bars]
            widths = [bar.get(name, 0.0) for bar in bars]
            axes.barh(
                range(len(runs)), widths, left=lefts, height=0.62, label=name,
                color=PHASES.get(name, OTHER), edgecolor="white", linewidth=0.8,
            )  # fmt: skip
        for index, bar in enumerate(bars):
            axes.annotate(f" {sum(bar.values()):.3g} s", (sum(bar.values()), index), va="center", fontsize=8)
        axes.set(yticks=range(len(runs)), yticklabels=[_shortened(run.name) for run in runs])
        axes.set(title="time per step, by phase", xlabel="seconds per OPO step, mean over all steps")
        axes.title.set_fontweight("bold")
        axes.grid(axis="y", visible=False)
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.margins(x=0.08)
        canvas.legend(loc="outside right center")
        caption = (
            "Mean over all steps of a run; other: time outside the phases; tail: where training overlaps "
            "with generation, what follows the last response."
        )
        svg, png = _render(canvas, with_png)
    return _figure("time_by_phase", "Time", "time per step, by phase", caption, svg, png)


def _timeline_figure(run: Run, row: MetricsRow, with_png: bool) -> Figure:
    """A row of bars per trainer and per engine; white lines where responses ended."""
    ranks = row["ranks"][:SHOWN_RANKS]
    names = [f"{what} {rank}" for rank in range(len(ranks)) for what in (ENGINE, TRAINER)]
    with _canvas(9.4, 1.5 + 0.36 * len(names)) as canvas:
        axes = canvas.subplots()
        labels: set[str] = set()
        for number, rank in enumerate(ranks):
            for bar in bars_of(rank):
                place = 2 * number + (bar.row == TRAINER)
                label = None if bar.name in labels else bar.name
                labels.add(bar.name)
                axes.barh(
                    place, bar.end - bar.begin, left=bar.begin, height=0.7, label=label,
                    color=INTERVALS.get(bar.name, OTHER), edgecolor="white", linewidth=0.4,
                )  # fmt: skip
            unit = row["seconds"] / SHOWN_ENDS
            ends = [unit * cell for cell in sorted({round(end / unit) for end in rank[ENDED]})]
            axes.vlines(ends, 2 * number - 0.35, 2 * number + 0.35, color="white", linewidth=0.6)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="seconds since the step began")
        title = f"timeline of step {row['step']}, {_shortened(run.name)}"
        axes.set_title(title, fontweight="bold")
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.02 * row["seconds"])
        axes.set_ylim(len(names) - 0.5, -0.5)
        canvas.legend(loc="outside right center")
        all_ranks = len(row["ranks"])
        more = f"  The first {len(ranks)} of {all_ranks} ranks." if all_ranks > len(ranks) else ""
        caption = (
            "Of the last step that trained while its tail was sampled, by rank; white lines: responses that "
            f"ended.{more}"
        )
        svg, png = _render(canvas, with_png)
    return _figure(f"timeline_{run.name}", "Time", title, caption, svg, png)


def noise_of(arm: Arm) -> dict[str, Noise]:
    """The gradient's noise under every baseline, over all variance reports of an arm's runs."""
    reports = [row for run in arm.runs for row in variance_reports(run.rows)]
    return noise_intervals(reports) if len(reports) > 1 else {}


def _noise_figure(noise: dict[str, dict[str, Noise]], with_png: bool) -> Figure:
    """One row per baseline, one marker per arm."""
    measured = {title: values for title, values in noise.items() if values}
    names = [name for name in UNBIASED if any(name in values for values in measured.values())]
    with _canvas(9.4, 1.5 + 0.3 * len(names) * max(1.0, len(measured) / 2)) as canvas:
        axes = canvas.subplots()
        for index, (title, values) in enumerate(measured.items()):
            offset = (index - (len(measured) - 1) / 2) * 0.6 / len(measured)
            shown = [(row, values[name]) for row, name in enumerate(names) if name in values]
            axes.errorbar(
                [one.value for _, one in shown],
                [row + offset for row, _ in shown],
                xerr=[
                    [one.value - one.low for _, one in shown],
                    [one.high - one.value for _, one in shown],
                ],
                fmt=MARKERS[index % len(MARKERS)],
                color=COLOURS[index % len(COLOURS)],
                markersize=4,
                linewidth=1.2,
                label=_shortened(title),
            )
        axes.axvline(1.0, color="#999999", linewidth=0.8)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="variance within a prompt, rloo = 1")
        axes.set(title="noise of the gradient under every unbiased baseline")
        axes.title.set_fontweight("bold")
        axes.set_ylim(len(names) - 0.5, -0.5)
        canvas.legend(loc="outside right center")
        caption = (
            "What the responses to a prompt add to the gradient's variance, from the runs' variance reports, "
            "with 95 % bootstrap intervals over reports.  Lower is better."
        )
        svg, png = _render(canvas, with_png)
    title = "noise by baseline"
    return _figure("noise_by_baseline", "Noise of the gradient", title, caption, svg, png)


def _before(bar: dict[str, float], name: str) -> float:
    """Left end of the part `name` of a bar: the sum of the parts before it."""
    keys = list(bar)
    return sum(bar[key] for key in keys[: keys.index(name)]) if name in bar else 0.0


@contextmanager
def _canvas(width: float, height: float) -> Iterator[Canvas]:
    import matplotlib.pyplot as plt

    canvas = plt.figure(figsize=(width, height))
    try:
        yield canvas
    finally:
        plt.close(canvas)


def _render(canvas: Canvas, with_png: bool) -> tuple[str, bytes | None]:
    """SVG, and PNG if requested."""
    svg = StringIO()
    canvas.savefig(svg, format="svg", metadata={"Date": None})
    if not with_png:
        return svg.getvalue(), None
    canvas.set_layout_engine("none")  # keep the layout of the SVG
    picture = BytesIO()
    canvas.savefig(picture, format="png", dpi=150)
    return svg.getvalue(), picture.getvalue()


def _figure(name: str, section: str, title: str, caption: str, svg: str, png: bytes | None) -> Figure:
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return Figure(safe, section, title, caption, _inline(svg, safe, title), png)


def _inline(svg: str, name: str, title: str) -> str:
    """An SVG for embedding in a page with others: without prolog and comments, with unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    opening, _, content = svg.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None
    # The page sets the width, the view box the aspect ratio.
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {view_box.group()} role="img" aria-label="{escape(title)}">{content}'
