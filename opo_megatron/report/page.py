"""The page: one HTML file that needs no network, made of `page.html`, `page.css` and `page.js`.

Three measures keep data from becoming markup: tables escape their content; rollouts are embedded as JSON
with `<` written as `\\u003c`, and inserted as text; the page's content security policy allows only the script
whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import Any

from opo_megatron.report.arms import SAME_ARM, Arm
from opo_megatron.report.figures import Figure
from opo_megatron.report.paired import paired_table
from opo_megatron.report.rollouts import TOKENS_KEPT, embedded_rollouts
from opo_megatron.report.tables import config_table, results_table, runs_table

LONGEST_TITLE = 90
"""A title longer than this leaves the names of the arms to the table."""
ARMS_NOTE = f"Runs whose settings differ only in {', '.join(SAME_ARM[:-1])} or {SAME_ARM[-1]} form one arm."
RESULTS_NOTE = (
    "Each number is the mean over an arm's runs ± the half width of its 95 % confidence interval "
    "(Student's t); an arm of one run has none.  Start and end are the first and the last measured step; "
    "best is each run's own best step, which is optimistic for noisy metrics."
)
CURVES_NOTE = (
    "Lines are means over an arm's runs, at the steps that all of them have; bands span the lowest to the "
    "highest run.  Where a run is longer than the others of its arm, its own values continue as a thin line."
)


def make_page(
    arms: Sequence[Arm], figures: Sequence[Figure], groups: int, show: Callable[[str, float], None]
) -> str:
    """The HTML of a report.

    Args:
        groups: number of prompts, with all their samples, over all runs.
        show: called with the current work and the fraction done (0 to 1).
    """
    runs = [run for arm in arms for run in arm.runs]
    rollouts = embedded_rollouts(runs, groups, show)
    steps: dict[str, list[int]] = {}
    for group in rollouts["groups"]:
        of_run = steps.setdefault(runs[group["run"]].name, [])
        of_run += [group["step"]] * (group["step"] not in of_run)
    script, paired = _part("page.js"), paired_table(arms)
    return Template(_part("page.html")).substitute(
        title=escape(_title(arms)),
        lead="Made by opo report from the files of the runs.",
        style=_part("page.css"),
        script=script,
        script_hash=_hash(script),
        navigation=_navigation(figures, has_differences=bool(paired)),
        arms_note=escape(ARMS_NOTE + _same_seed(arms)),
        runs=runs_table(arms, steps),
        results_note=escape(RESULTS_NOTE),
        results=results_table(arms),
        paired=paired,
        figures=_figures(figures),
        settings_note=escape(_settings_note(arms)),
        settings=config_table(arms),
        rollouts_note=escape(_rollouts_note(rollouts)),
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in rollouts["notes"]),
        data=as_script_data(rollouts),
    )


def as_script_data(value: Any) -> str:
    """JSON that cannot end the script element around it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return files("opo_megatron.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """A script's hash, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _title(arms: Sequence[Arm]) -> str:
    count = sum(len(arm.runs) for arm in arms)
    if len(arms) == 1:
        return arms[0].title
    names = ", ".join(arm.name for arm in arms)
    return f"{count} runs in {len(arms)} arms" + (f": {names}" if len(names) <= LONGEST_TITLE else "")


def _same_seed(arms: Sequence[Arm]) -> str:
    """A warning where runs of an arm share a seed: their band does not measure variation over seeds."""
    repeated = [arm.name for arm in arms if len({str(run.seed) for run in arm.runs}) < len(arm.runs)]
    if not repeated:
        return ""
    return f"  Runs of {', '.join(repeated)} share a seed: their spread is not over seeds."


def _settings_note(arms: Sequence[Arm]) -> str:
    if len(arms) == 1:
        return "There is one arm, so nothing differs."
    return "Settings that differ between arms are marked with ≠."


def _rollouts_note(rollouts: dict[str, Any]) -> str:
    count = len(rollouts["groups"])
    samples = sum(len(group["samples"]) for group in rollouts["groups"])
    return (
        f"This page holds {count} prompts with all their {samples} samples, from the first, the middle and "
        "the last step with saved rollouts of each run, evenly spaced in the batch and not chosen by reward "
        f"(--rollouts N sets their number).  Prompts and responses longer than {TOKENS_KEPT:,} tokens are "
        "shown without their middle."
    )


def _slug(section: str) -> str:
    return section.lower().replace(" ", "-")


def _navigation(figures: Sequence[Figure], has_differences: bool) -> str:
    sections = dict.fromkeys(figure.section for figure in figures)
    links = [("runs", "Runs"), ("results", "Results")]
    links += [("paired", "Differences")] if has_differences else []
    links += [(_slug(name), name) for name in sections]
    links += [("settings", "Settings"), ("rollouts", "Rollouts")]
    return "".join(f'<a href="#{escape(target)}">{escape(name)}</a>' for target, name in links)


def _figures(figures: Sequence[Figure]) -> str:
    """One HTML section per heading, in the figures' order."""
    html = []
    for index, (section, group) in enumerate(groupby(figures, key=lambda figure: figure.section)):
        drawings = "".join(
            f"<figure>{figure.svg}<figcaption>{escape(figure.caption)}</figcaption></figure>"
            for figure in group
        )
        wide = " wide" if section == "Time" else ""
        note = f"<p>{escape(CURVES_NOTE)}</p>" if index == 0 and section != "Time" else ""
        html.append(
            f'<section id="{_slug(section)}"><h2>{escape(section)}</h2>{note}'
            f'<div class="figures{wide}">{drawings}</div></section>'
        )
    return "\n".join(html)
