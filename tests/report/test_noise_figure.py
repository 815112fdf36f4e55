"""The figure of the gradient's noise by baseline, from the rows of variance reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opo_megatron.observe.gradient_noise import UNBIASED
from opo_megatron.report.arms import Arm
from opo_megatron.report.figures import figures_of, noise_of
from opo_megatron.report.runs import Run
from tests.support.requirements import require


def arm(name: str, missing: tuple[str, ...] = (), reports: int = 6) -> Arm:
    """An arm of one run, whose reports lack some baselines."""
    names = [name for name in UNBIASED if name not in missing]
    rows: list[dict[str, Any]] = [{"step": 0}]
    for step in range(1, reports + 1):
        noise = {f"variance/{one}": 1.0 + i + step % 3 / 10 for i, one in enumerate(names)}
        rows.append({"step": step, "reward/mean": 0.5} | noise)
    return Arm(name, [Run(Path(name), name, {}, rows, {})])


def test_baselines_that_all_reports_have_get_an_interval() -> None:
    assert set(noise_of(arm("a", missing=("remax",)))) == set(UNBIASED) - {"remax"}
    for value, low, high in noise_of(arm("a")).values():
        assert low <= value <= high
    assert noise_of(arm("a", reports=1)) == {}, "one report has no interval"
    assert noise_of(Arm("none", [Run(Path("n"), "n", {}, [{"step": 0}], {})])) == {}


@pytest.mark.parametrize("missing", [(), ("otb_loo", "james_stein")])
def test_only_runs_with_reports_have_a_figure_of_the_noise(missing: tuple[str, ...]) -> None:
    require("matplotlib", "pip install -e '.[report]'")
    with_reports = figures_of([arm("a"), arm("b", missing)], False, lambda *_: None)
    assert "noise_by_baseline" in [figure.name for figure in with_reports]
    figure = next(figure for figure in with_reports if figure.name == "noise_by_baseline")
    assert figure.section == "Noise of the gradient" and "intervals" in figure.caption
    assert figure.svg.count("<path") > 2 * len(UNBIASED)
    without = figures_of([Arm("none", [Run(Path("n"), "n", {}, [{"step": 0}], {})])], False, lambda *_: None)
    assert "noise_by_baseline" not in [figure.name for figure in without]
