"""Steps do not depend on the parallel layout: `tools/check_layouts.py`, which compares with one process."""

from __future__ import annotations

import check_layouts
import pytest


def test_three_layouts_take_the_same_steps_as_one_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert check_layouts.compare(["tp2pp2", "dp2", "cp2dp2"]) == 0
    assert capfd.readouterr().out.count(" ok ") == 6  # three layouts, untied and tied


@pytest.mark.slow
def test_every_layout_takes_the_same_steps_as_one_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert check_layouts.compare(list(check_layouts.LAYOUTS)) == 0
    assert capfd.readouterr().out.count(" ok ") == 2 * len(check_layouts.LAYOUTS)
