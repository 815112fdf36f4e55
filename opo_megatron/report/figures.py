"""The figures, by matplotlib: the page holds them as SVG, `--png` writes the same ones as pictures.

Arms have the colours of Okabe and Ito, which colour-blind people can tell apart, and line styles of
their own, so that a print without colour can be read too.  Text is drawn as outlines: a page looks the
same everywhere, and nothing in a name (a `$`, a `<`) is read as markup.
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

from opo_megatron.report.arms import Arm, Band, band, bin_size
from opo_megatron.report.measures import Measure, sections_of
from opo_megatron.report.runs import Run
from opo_megatron.utils.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("o", "s", "^", "D", "v")
PHASES = {
    "rollout": "#0072B2", "reward": "#E69F00", "variance": "#CC79A7", "train": "#D55E00", "sync": "#009E73",
    "eval": "#56B4E9", "audit": "#999999",
}  # fmt: skip
OTHER = "#DDDDDD"
FEW_POINTS = 30
"""Curves of at most so many points show them."""
LONGEST_NAME = 40
"""A name in a legend is cut to so many characters."""
TWO_COLUMNS = 30
"""Names of at most so many characters stand beside each other."""
STYLE = {
    "font.size": 9.0, "axes.titlesize": 10.0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#E4E4E4", "grid.linewidth": 0.7, "axes.axisbelow": True,
    "legend.frameon": False, "legend.fontsize": 8.0, "svg.fonttype": "path", "svg.hashsalt": "opo",
    "text.parse_math": False, "figure.constrained_layout.use": True,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One drawing in both forms."""

    name: str
    """Of its file."""
    section: str
    title: str
    caption: str
    svg: str
    png: bytes | None
    """None where no pictures were asked for."""


def figures_of(arms: Sequence[Arm], with_png: bool, show: Callable[[str, float], None]) -> list[Figure]:
    """All figures: one per metric, then where the seconds go.

    Args:
        with_png: also as pictures, which takes as long again.
        show: is told what is drawn, and how much of all is done (0 to 1).

    Raises:
        UserError: where matplotlib is missing.
    """
    matplotlib = require_extra("matplotlib", "opo report", "report")
    matplotlib.use("Agg")
    found: list[Figure] = []
    sections = sections_of(arms)
    total = sum(map(len, sections.values())) + 1
    with matplotlib.rc_context(STYLE):
        for section, measures in sections.items():
            for measure in measures:
                show(f"drawing {measure.title}", len(found) / total)
                found.append(_curve_figure(section, measure, arms, with_png))
        runs = [run for arm in arms for run in arm.runs]
        if any(phases_of(run) for run in runs):
            found.append(_time_figure(runs, with_png))
    return found


def _curve_figure(section: str, measure: Measure, arms: Sequence[Arm], with_png: bool) -> Figure:
    from matplotlib import ticker

    rows = math.ceil(len(arms) / _columns([_cut(arm.title) for arm in arms]))
    with _canvas(4.6, 3.25 + 0.16 * rows) as canvas:
        axes = canvas.subplots()
        curves = [(place, arm, band(arm, measure.metric)) for place, arm in enumerate(arms)]
        drawn = [(place, arm, curve) for place, arm, curve in curves if curve is not None]
        bands = [curve for _, _, curve in drawn]
        lines = [draw_band(axes, place, curve) for place, _, curve in drawn]
        axes.set(title=measure.title, xlabel="OPO step", ylabel=measure.unit)
        axes.title.set_fontweight("bold")
        if measure.logarithmic and _spans_decades(bands):
            axes.set_yscale("log")
            for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                set_formatter(ticker.LogFormatter())  # the usual one writes TeX
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        has_band = any(curve.runs > 1 for curve in bands)
        _legend(canvas, lines, [_cut(arm.title) for _, arm, _ in drawn], has_band)
        size = max(bin_size(len(run.series(measure.metric))) for arm in arms for run in arm.runs)
        binned = f"  A point stands for up to {size} steps." if size > 1 else ""
        caption = measure.meaning + binned
        svg, png = _render(canvas, with_png)
    return _figure(measure.metric.replace("/", "_"), section, measure.title, caption, svg, png)


def _spans_decades(bands: Sequence[Band]) -> bool:
    """Whether a logarithmic axis has something to show, and can show it."""
    low = min((float(curve.low.min()) for curve in bands if len(curve.low)), default=0.0)
    high = max((float(curve.high.max()) for curve in bands if len(curve.high)), default=0.0)
    return low > 0 and high >= 10 * low


def draw_band(axes: Axes, place: int, curve: Band) -> Line2D:
    """The arm's line, over its band."""
    colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
    marker = MARKERS[place % len(MARKERS)] if len(curve.steps) <= FEW_POINTS else None
    if curve.runs > 1 and len(curve.steps):
        axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    for steps, values in curve.tails:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.8)
    (line,) = axes.plot(
        curve.steps, curve.mean, color=colour, linestyle=dashes, linewidth=1.6, marker=marker, markersize=3.2
    )
    return line


def _legend(canvas: Canvas, lines: Sequence[Line2D], names: Sequence[str], has_band: bool) -> None:
    """Below the figure, where it covers nothing, and says what a band is."""
    title = "line: mean of the runs; band: least to greatest" if has_band else None
    canvas.legend(
        lines, names, loc="outside lower center", ncols=_columns(names), title=title, title_fontsize=7.5
    )


def _columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names)) <= TWO_COLUMNS and len(names) > 1 else 1


def _cut(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def phases_of(run: Run) -> dict[str, float]:
    """Mean seconds per OPO step by phase; what no phase claims is `other`."""
    steps = [row for row in run.rows if row.get("time/step")]
    if not steps:
        return {}
    names = dict.fromkeys(name for row in steps for name in row if name.startswith("time/"))
    seconds = {
        name.removeprefix("time/"): sum(row.get(name) or 0.0 for row in steps) / len(steps) for name in names
    }
    whole = seconds.pop("step")
    # The audit comes after the step's clock has been read.
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
        for place, bar in enumerate(bars):
            axes.annotate(f" {sum(bar.values()):.3g} s", (sum(bar.values()), place), va="center", fontsize=8)
        axes.set(yticks=range(len(runs)), yticklabels=[_cut(run.name) for run in runs])
        axes.set(title="time of a step, by phase", xlabel="seconds per OPO step, mean over all steps")
        axes.title.set_fontweight("bold")
        axes.grid(axis="y", visible=False)
        axes.set_ylim(len(runs) - 0.5, -0.5)
        axes.margins(x=0.08)
        canvas.legend(loc="outside right center")
        caption = "Mean over all steps of a run; other: what lies between the phases."
        svg, png = _render(canvas, with_png)
    return _figure("time_by_phase", "Time", "time of a step, by phase", caption, svg, png)


def _before(bar: dict[str, float], name: str) -> float:
    """Where the part `name` begins: the sum of those left of it."""
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
    """SVG, and PNG where asked for."""
    drawing = StringIO()
    canvas.savefig(drawing, format="svg", metadata={"Date": None})
    if not with_png:
        return drawing.getvalue(), None
    canvas.set_layout_engine("none")  # it stands
    picture = BytesIO()
    canvas.savefig(picture, format="png", dpi=150)
    return drawing.getvalue(), picture.getvalue()


def _figure(name: str, section: str, title: str, caption: str, svg: str, png: bytes | None) -> Figure:
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return Figure(safe, section, title, caption, _inline(svg, safe, title), png)


def _inline(svg: str, name: str, title: str) -> str:
    """An SVG that may stand beside others in a page: no prolog, no comments, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    opening, _, content = svg.partition(">")
    found = re.search(r'viewBox="[^"]*"', opening)
    assert found is not None
    # The page gives the width, the view box the shape.
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {found.group()} role="img" aria-label="{escape(title)}">{content}'
