"""The arena's numbers: a value per row and seed, paired differences to OPO, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper.arena_plan import arm_of
from paper.arms import SeedRuns, read_measures, rows_of
from paper.figures import load_pyplot

from opo_megatron.report.arms import Arm, Band, band
from opo_megatron.report.figures import STYLE, draw_band
from opo_megatron.report.paired import compared
from opo_megatron.report.runs import Run, read_runs

SAMPLER_KL = "KL sampler to policy"
PANELS = {
    "eval/accuracy": "held-out accuracy",
    "eval/pass@16": "held-out pass@16",
    "entropy": "entropy, nats per training token",
    SAMPLER_KL: "KL sampler to policy (k3), nats per token",
    "eval/kl": "KL to the initial weights, nats per token",
    "variance/this_run": "gradient variance (trace)",
}
"""Metrics of the curves; those that a size does not measure have an empty panel."""
COMPARED = ("pass@1", "pass@16", "training_entropy", "entropy", "kl", "length", "sampler_kl", "noise")
PER_FIGURE = 7
"""Rows in a figure, which has as many colours."""

Values = dict[str, dict[str, dict[int, float]]]
"""Measure → row → seed → value."""


def measures_of(seeds: Sequence[SeedRuns], rows: Sequence[str]) -> Values:
    """What every run measured at its end; a measure that one has not is left out of it."""
    values: Values = {}
    for row in rows:
        for seed in seeds:
            arm = arm_of(row)
            found = read_measures(seed, arm) | _of_training(seed, row)
            for name, value in found.items():
                if value is not None:
                    values.setdefault(name, {}).setdefault(row, {})[seed.number] = round(value, 6)
    return values


def _of_training(seed: SeedRuns, row: str) -> dict[str, float | None]:
    """Means over the steps: the KL of the sampler to the policy, and the variance of the row's estimator."""
    steps = rows_of(seed, arm_of(row))[1:]
    kl = [sampler_kl(one) for one in steps if sampler_kl(one) is not None]
    noise = [one["variance/this_run"] for one in steps if "variance/this_run" in one]
    return {
        "sampler_kl": sum(kl) / len(kl) if kl else None,
        "noise": sum(noise) / len(noise) if noise else None,
    }


def sampler_kl(row: Mapping[str, Any]) -> Any:
    """k3 of a step between its sampler and the policy that begins to train on it."""
    return row.get("off_policy/k3", row.get("on_policy/k3"))


def paired_results(values: Values, reference: str) -> dict[str, dict[str, Any]]:
    """Measure → row → its paired difference to the reference row."""
    return {
        measure: {
            row: {
                "difference": round(one.mean, 6),
                "± 95 %": round(one.half_width, 6),
                "± 95 %, corrected": round(one.corrected, 6),
                "seeds": one.seeds,
            }
            for row, one in compared(values[measure], reference).items()
        }
        for measure in COMPARED
        if measure in values
    }


def print_results(task: str, found: dict[str, dict[str, Any]]) -> None:
    """A line per row for the two accuracies."""
    for measure in ("pass@1", "pass@16"):
        for row, one in found.get(measure, {}).items():
            corrected = one["± 95 %, corrected"]
            sign = "differs" if abs(one["difference"]) > corrected else "no difference seen"
            print(f"{task}  {measure:<8} {row:<26} {one['difference']:+.4f} ± {corrected:.4f}  {sign}")


# ---------------------------------------------------------------------- figures


def plot_all(seeds: Sequence[SeedRuns], rows: Sequence[str], task: str, target: Path) -> list[Path]:
    """Curves against samples, OPO in every figure beside up to six other rows, and the paired differences."""
    target.mkdir(parents=True, exist_ok=True)
    others = [row for row in rows if row != rows[0]]
    parts = [others[i : i + PER_FIGURE - 1] for i in range(0, len(others), PER_FIGURE - 1)]
    figures = [
        _plot_curves(seeds, [rows[0], *part], f"{task}: {len(seeds)} seeds, band from minimum to maximum",
                     target / f"arena_{task}_curves_{number}.png")
        for number, part in enumerate(parts, 1)
    ]  # fmt: skip
    values = measures_of(seeds, rows)
    return [*figures, _plot_differences(values, rows, task, target / f"arena_{task}_differences.png")]


def _plot_curves(seeds: Sequence[SeedRuns], rows: Sequence[str], title: str, path: Path) -> Path:
    plt = load_pyplot()
    from matplotlib.ticker import LogFormatter

    rollout = seeds[0].config(arm_of(rows[0])).rollout
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 3, figsize=(13, 7.4))
        for axes, (metric, label) in zip(panels.flat, PANELS.items(), strict=True):
            for index, row in enumerate(rows):
                curve = _curve(seeds, row, metric)
                if curve is not None and len(curve.steps):
                    draw_band(axes, index, curve._replace(steps=curve.steps * samples, tails=[]))
            if metric == SAMPLER_KL:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(LogFormatter())  # the default writes TeX
            axes.set(title=label, xlabel="training samples")
        figure.legend(
            [draw_band(panels[0, 0], index, _empty()) for index in range(len(rows))],
            rows,
            loc="outside lower center",
            ncols=min(4, len(rows)),
        )
        figure.suptitle(title)
        figure.savefig(path, dpi=100)
        plt.close(figure)
    return path


def _curve(seeds: Sequence[SeedRuns], row: str, metric: str) -> Band | None:
    runs = read_runs([seed.run(arm_of(row)) for seed in seeds])
    if metric == SAMPLER_KL:
        runs = [_with_sampler_kl(run) for run in runs]
    return band(Arm(row, runs), metric)


def _with_sampler_kl(run: Run) -> Run:
    rows = [one | {SAMPLER_KL: sampler_kl(one)} if sampler_kl(one) is not None else one for one in run.rows]
    return Run(run.path, run.name, run.settings, rows, run.dumps)


def _empty() -> Band:
    import numpy as np

    nothing = np.array([], dtype=float)
    return Band(nothing, nothing, nothing, nothing, 1, [])


def _plot_differences(values: Values, rows: Sequence[str], task: str, path: Path) -> Path:
    """A panel per measure: the difference of each row to OPO, thick its own interval, thin the corrected."""
    plt = load_pyplot()
    shown = [name for name in ("pass@1", "pass@16", "training_entropy", "kl") if name in values]
    with plt.rc_context(STYLE):
        figure, _ = plt.subplots(1, len(shown), figsize=(3.4 * len(shown) + 1.6, 0.8 + 0.3 * len(rows)))
        for position, (axes, measure) in enumerate(zip(figure.axes, shown, strict=True)):
            found = compared(values[measure], rows[0])
            for height, (_, one) in enumerate(found.items()):
                axes.plot([one.mean - one.corrected, one.mean + one.corrected], [height] * 2, color="#999999")
                axes.plot(
                    [one.mean - one.half_width, one.mean + one.half_width], [height] * 2,
                    color="#0072B2", linewidth=3,
                )  # fmt: skip
                axes.plot([one.mean], [height], "o", color="#D55E00", markersize=4)
            axes.axvline(0, color="#000000", linewidth=0.8)
            axes.set_yticks(range(len(found)), list(found) if position == 0 else [""] * len(found))
            axes.invert_yaxis()
            axes.set_title(measure)
        figure.suptitle(f"{task}: differences to {rows[0]}; thick: 95 %, thin: corrected for all rows")
        figure.savefig(path, dpi=100)
        plt.close(figure)
    return path
