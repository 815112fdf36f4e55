"""Differences between arms, paired by seed, with intervals corrected for their number.

Two runs of the same seed see the same prompts, and in a comparison from shared warm starts the same first
weights.  With the differences d₁ … dₙ of one measure over n ≥ 2 shared seeds, their mean d and their sample
standard deviation s, an interval is d ± t·s/√n, with Student's t for n − 1 degrees of freedom.

Of many intervals at 95 % some exclude 0 by chance.  Those corrected by Bonferroni take the quantile of
1 − 0.05/m for m comparisons, so that with 95 % none of the m leaves out its true value, whatever their
dependence.  With few seeds they are wide: that is what few seeds can say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from opo_megatron.report.arms import Arm
from opo_megatron.report.measures import SECTIONS
from opo_megatron.utils.extras import require_extra

CONFIDENCE = 0.95
RULE = "paired by seed, 95 % t intervals; corrected by Bonferroni for all comparisons of the measure"


class Paired(NamedTuple):
    """The mean of paired differences, with the half widths of its intervals."""

    mean: float
    half_width: float
    """Of this comparison alone."""
    corrected: float
    """Of all comparisons together."""
    seeds: int

    @property
    def differs(self) -> bool:
        """Whether the corrected interval excludes 0."""
        return abs(self.mean) > self.corrected


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t: the value that a share `probability` is below."""
    special = require_extra("scipy.special", "intervals of paired differences", "report")
    return float(special.stdtrit(degrees, probability))


def paired(differences: Sequence[float], comparisons: int) -> Paired:
    """The mean of at least two differences, and its intervals among `comparisons`."""
    count = len(differences)
    if count < 2:
        raise ValueError("an interval needs at least two differences")
    mean = math.fsum(differences) / count
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in differences) / (count - 1))
    error, tail = deviation / math.sqrt(count), (1 - CONFIDENCE) / 2
    alone, together = (t_quantile(1 - tail / m, count - 1) for m in (1, comparisons))
    return Paired(mean, alone * error, together * error, count)


def compared(values: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Paired]:
    """Every other arm against `reference`, on the seeds that both have; none where these are fewer than two.

    Args:
        values: arm → seed → the measure.
    """
    others = {name: of_seed for name, of_seed in values.items() if name != reference}
    base = values.get(reference, {})
    shared = {name: sorted(set(of_seed) & set(base)) for name, of_seed in others.items()}
    enough = [name for name, seeds in shared.items() if len(seeds) > 1]
    return {
        name: paired([others[name][seed] - base[seed] for seed in shared[name]], len(enough))
        for name in enough
    }


def at_the_end(arm: Arm, metric: str) -> dict[int, float]:
    """Seed → the last value of a metric; a seed of several runs has no pair, and is left out."""
    seeds = [run.seed for run in arm.runs]
    return {
        run.seed: series[max(series)]
        for run in arm.runs
        if isinstance(run.seed, int) and seeds.count(run.seed) == 1 and (series := run.series(metric))
    }


def paired_table(arms: Sequence[Arm]) -> str:
    """Paired differences to the first arm at the end of the runs, as HTML; empty where nothing is paired."""
    rows = []
    known = {measure.metric: measure for measures in SECTIONS.values() for measure in measures}
    present = dict.fromkeys(
        name
        for arm in arms
        for run in arm.runs
        for name in run.metrics()
        if name in known or name.startswith(("eval/accuracy", "eval/pass@"))
    )
    for metric in present:
        found = compared({arm.name: at_the_end(arm, metric) for arm in arms}, arms[0].name)
        title = known[metric].title if metric in known else metric
        for index, (name, one) in enumerate(found.items()):
            first = f'<th scope="row" rowspan="{len(found)}">{escape(title)}</th>' if index == 0 else ""
            bold = "<b>{}</b>" if one.differs else "{}"
            rows.append(
                f"<tr>{first}<td>{escape(name)}</td><td class='number'>{bold.format(f'{one.mean:+.4g}')}</td>"
                f"<td class='number'>± {one.half_width:.3g}</td><td class='number'>± {one.corrected:.3g}</td>"
                f"<td class='number'>{one.seeds}</td></tr>"
            )
    if not rows:
        return ""
    head = "".join(
        f"<th scope='col'>{title}</th>"
        for title in ("metric, at the end", "arm", "difference", "95 %", "95 %, corrected", "seeds")
    )
    return (
        f'<section id="paired"><h2>Differences to {escape(arms[0].name)}</h2><p>{escape(RULE)}. Bold: the '
        "corrected interval excludes 0.</p><div class='scroll'><table><thead><tr>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )
