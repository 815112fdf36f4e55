"""The tables of the page: results, runs, settings side by side.  This module escapes all data."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from opo_megatron.report.arms import SAME_ARM, Arm, Mean, differing_keys, mean_of, setting_text
from opo_megatron.report.figures import phases_of
from opo_megatron.report.measures import Measure, sections_of
from opo_megatron.report.runs import Run

ABSENT = "–"
"""Not measured, or not a setting of that run."""


class Result(NamedTuple):
    """A metric of an arm, over the runs that measured it."""

    start: Mean
    end: Mean
    best: Mean | None
    """Each run's own best, where the metric has a better direction."""
    best_steps: tuple[int, int] | None
    """The first and the last step of those."""


def result_of(arm: Arm, measure: Measure) -> Result | None:
    """None where no run of the arm has the metric."""
    series = [one for run in arm.runs if (one := run.series(measure.metric))]
    if not series:
        return None
    start = mean_of([one[min(one)] for one in series])
    end = mean_of([one[max(one)] for one in series])
    if measure.better is None:
        return Result(start, end, None, None)
    choose = max if measure.better == "high" else min
    # Among equal values, the first step is the best.
    steps = [choose(sorted(one), key=one.__getitem__) for one in series]
    best = mean_of([one[step] for one, step in zip(series, steps, strict=True)])
    return Result(start, end, best, (min(steps), max(steps)))


def results_table(arms: Sequence[Arm]) -> str:
    """Start, end and best of every metric, one row per arm."""
    rows = []
    for section, measures in sections_of(arms).items():
        rows.append(f'<tr class="section"><th colspan="6" scope="rowgroup">{escape(section)}</th></tr>')
        for measure in measures:
            results = [(arm, result) for arm in arms if (result := result_of(arm, measure))]
            for index, (arm, result) in enumerate(results):
                first = ""
                if index == 0:
                    name = f"{escape(measure.title)} <small>{escape(measure.unit)}</small>"
                    first = f'<th scope="row" rowspan="{len(results)}">{name}</th>'
                group = ' class="first"' if index == 0 else ""
                rows.append(f"<tr{group}>{first}{_result_cells(arm, measure, result)}</tr>")
    head = _head("metric", "arm", "start", "end", "best", "best at step")
    return f"<table class='results'>{head}<tbody>{''.join(rows)}</tbody></table>"


def _result_cells(arm: Arm, measure: Measure, result: Result) -> str:
    steps = ""
    if result.best_steps is not None:
        low, high = result.best_steps
        steps = f"{low}" if low == high else f"{low} to {high}"
    numbers = [mean_text(mean, measure.number_format) for mean in (result.start, result.end, result.best)]
    cells = "".join(f'<td class="number">{text}</td>' for text in (*numbers, steps))
    is_partial = result.end.runs < len(arm.runs)
    measured = f" <small>{result.end.runs} of {len(arm.runs)} runs</small>" if is_partial else ""
    return f"<td>{escape(arm.name)}{measured}</td>{cells}"


def mean_text(mean: Mean | None, number_format: str) -> str:
    """`0.452 ± 0.031`; without an interval the mean alone."""
    if mean is None:
        return ""
    if mean.half_width is None:
        return number_format.format(mean.value)
    return f"{number_format.format(mean.value)} ± {number_format.replace('+', '').format(mean.half_width)}"


def runs_table(arms: Sequence[Arm], embedded: dict[str, list[int]]) -> str:
    """One row per run: progress, tokens and time, and the rollouts in the page.

    Args:
        embedded: steps whose rollouts are in the page, by run.
    """
    rows = []
    for arm in arms:
        for run in arm.runs:
            rows.append(
                f"<tr><th scope='row' title='{escape(str(run.path))}'>{escape(run.name)}</th>"
                f"<td>{escape(arm.name)}</td><td class='number'>{escape(setting_text(run.seed))}</td>"
                f"<td>{escape(_progress(run))}</td><td class='number'>{run.attempts}</td>"
                f"<td class='number'>{_total(run, 'tokens/response')}</td>"
                f"<td class='number'>{_hours(run)}</td>"
                f"<td>{_dumped(run, embedded.get(run.name, []))}</td></tr>"
            )
    head = _head(
        "run", "arm", "seed", "OPO steps", "attempts", "response tokens", "time of OPO steps",
        "rollouts <small>steps in this page</small>",
    )  # fmt: skip
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _progress(run: Run) -> str:
    return f"{run.steps} of {run.planned}" + ("" if run.is_finished else ", unfinished")


def _total(run: Run, metric: str) -> str:
    values = run.series(metric)
    return f"{sum(values.values()):,.0f}" if values else ABSENT


def _hours(run: Run) -> str:
    seconds = sum(run.series("time/step").values())
    if not phases_of(run):
        return ABSENT
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else (
        f"{seconds / 3600:.1f} h"
    )  # fmt: skip


def _dumped(run: Run, steps: Sequence[int]) -> str:
    if not run.dumps:
        return "none"
    in_page = ", ".join(map(str, steps)) if steps else "none"
    return f"{in_page} <small>of {len(run.dumps)} saved</small>"


def config_table(arms: Sequence[Arm]) -> str:
    """Every setting of every arm; rows that differ are marked, the others are hidden by default."""
    differing = set(differing_keys(arms))
    keys = dict.fromkeys(key for arm in arms for key in arm.settings if key not in SAME_ARM)
    rows = []
    for key in keys:
        status = "differs" if key in differing else "same"
        values = (setting_text(arm.settings[key]) if key in arm.settings else ABSENT for arm in arms)
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        mark = "<span class='mark' title='differs'>≠</span> " if key in differing else ""
        rows.append(f"<tr class='{status}'><th scope='row'>{mark}<code>{escape(key)}</code></th>{cells}</tr>")
    head = _head("setting", *(escape(arm.title) for arm in arms))
    return f"<table class='settings'>{head}<tbody>{''.join(rows)}</tbody></table>"


def _head(*names: str) -> str:
    """The table's head; names are HTML."""
    return "<thead><tr>" + "".join(f"<th scope='col'>{name}</th>" for name in names) + "</tr></thead>"
