"""Plots a run's variance reports: gradient variance by baseline, and correlations of ‖∇log π‖².

    pip install -e '.[report]'
    python tools/plot_variance.py runs/quickstart              # → runs/quickstart/variance.png
    python tools/plot_variance.py runs/a runs/b --output both.png

The run needs `algorithm.variance_every` above 0.  Left: the gradient variance between responses to one
prompt, relative to RLOO's, as a moving average over reports; all estimators have the same expectation, so
lower is better.  Right: the correlation of a response's ‖∇log π‖² with its length, which the paper's baseline
assumes, and with its energy.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opo_megatron.observe.gradient_noise import UNBIASED, relative_noise
from opo_megatron.utils.terminal import prepare_terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = 10
"""Reports in the moving average."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--output", type=Path, help="PNG to write (default: variance.png in the first RUN)")
    options = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        print("error: matplotlib is missing; install it with: pip install -e '.[report]'", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (noise, correlations) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for run in options.runs:
        try:
            reports = reports_of(run)
        except OSError as error:
            print(f"error: {run} is no folder of a run ({error.strerror}: metrics.jsonl)", file=sys.stderr)
            return 2
        if not reports:
            print(f"error: {run} holds no variance report; set algorithm.variance_every", file=sys.stderr)
            return 2
        plot_noise(noise, reports)
        plot_correlations(correlations, reports)
    noise.set(title="gradient variance within a prompt, RLOO = 1", xlabel="OPO step")
    correlations.set(title="correlation of ‖∇log π‖² within a prompt", xlabel="OPO step", ylim=(-1.05, 1.05))
    for axes in (noise, correlations):
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys())
    output = options.output or options.runs[0] / "variance.png"
    figure.savefig(output, dpi=120)
    print(f"written to {output}")
    return 0


def reports_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "variance/rloo" in row]


def plot_noise(axes: Axes, reports: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in reports]
    windows = [relative_noise(reports[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(reports))]
    for colour, name in enumerate(n for n in UNBIASED if n != "none"):
        values = [window.get(name, float("nan")) for window in windows]
        axes.plot(steps, values, f"C{colour}", label=name)


def plot_correlations(axes: Axes, reports: list[dict[str, Any]]) -> None:
    for colour, name in enumerate(("length", "energy", "energy_hidden")):
        key = f"variance/correlation_{name}"
        points = [(row["step"], row[key]) for row in reports if key in row]
        style = "--" if name == "energy_hidden" else "-"
        axes.plot(*zip(*points, strict=True), f"C{colour}{style}", label=name.replace("_hidden", "·‖h‖²"))


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
