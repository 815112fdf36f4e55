"""The page in a real browser: rendered, filtered, opened, printed; no hostile script runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from opo_megatron.cli.main import main
from tests.support.browser import Browser, browser
from tests.support.fake_runs import BYTES, HOSTILE, make_run
from tests.support.requirements import require

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as chromium_browser:
        yield chromium_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs: OPO, and RLOO with hostile texts; the token `~` decodes to hostile text."""
    require("matplotlib", "pip install -e '.[report]'")

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace").replace("~", HOSTILE)

    folder = tmp_path_factory.mktemp("report")
    runs = [
        make_run(folder / "opo", *BYTES, texts=("one plus one", "2", "two, I think", "eleven")),
        make_run(folder / "rloo", *BYTES, "algorithm.baseline=rloo", texts=("~", "~", "no")),
    ]
    out = folder / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opo_megatron.tasks.decoder", lambda name, tokenizer: decode)
        assert main(["report", *map(str, runs), "--rollouts", "24", "--out", str(out)]) == 0
    yield out


@pytest.fixture
def opened(chromium: Browser, page: Path) -> Browser:
    chromium.open(page)
    return chromium


def samples(chromium: Browser) -> int:
    return chromium.run("document.querySelectorAll('#list .chip').length")


def choose(chromium: Browser, control: str, value: str) -> None:
    chromium.run(
        f"(() => {{ const e = document.getElementById('filter-{control}'); e.value = {json.dumps(value)};"
        "for (const name of ['input', 'change']) e.dispatchEvent(new Event(name, {bubbles: true})); })()"
    )


def test_the_page_renders_without_console_messages(opened: Browser, tmp_path: Path) -> None:
    boxes = opened.run(
        "[...document.querySelectorAll('figure svg')].map(svg => svg.getBoundingClientRect())"
        ".map(box => [box.width, box.height])"
    )
    assert len(boxes) > 5 and all(width > 300 and height > 100 for width, height in boxes)
    curves = opened.run(
        "[...document.querySelectorAll('figure svg')].map(svg => Math.max("
        "...[...svg.querySelectorAll('path')].map(path => path.getBoundingClientRect().width)))"
    )
    assert all(width > 100 for width in curves), "every figure has a curve"
    assert opened.run("document.documentElement.scrollWidth") <= 1440, "nothing overflows"
    assert opened.picture(tmp_path / "page.png").startswith(b"\x89PNG")
    assert opened.complaints() == []


@pytest.mark.parametrize("width", [1024, 400])
def test_the_page_does_not_overflow_a_small_window(chromium: Browser, page: Path, width: int) -> None:
    chromium.open(page, width=width)
    assert chromium.run("document.documentElement.scrollWidth") <= width


def test_filters_reduce_the_list(opened: Browser) -> None:
    total = samples(opened)
    assert total == 12 * 3 + 12 * 2
    choose(opened, "run", "0")
    assert samples(opened) == 12 * 3
    choose(opened, "step", "6")
    assert samples(opened) == 4 * 3
    choose(opened, "low", "0.5")
    assert samples(opened) == 4, "one sample of each prompt is rewarded"
    choose(opened, "low", "")
    choose(opened, "text", "I THINK")
    assert samples(opened) == 4
    assert opened.run("document.getElementById('count').textContent") == "4 of 60 samples, 4 of 24 prompts"
    choose(opened, "text", "nowhere")
    assert samples(opened) == 0
    assert "No sample" in opened.run("document.getElementById('list').textContent")
    assert opened.complaints() == []


def test_a_click_opens_a_sample_with_coloured_tokens(opened: Browser) -> None:
    choose(opened, "text", "I think")
    opened.run("document.querySelector('#list .chip').click()")
    assert opened.run("document.querySelector('#list .chip').getAttribute('aria-pressed')") == "true"
    shown = opened.run("document.getElementById('sample').textContent")
    assert "sample 2 of 3" in shown and "−0.3333" in shown
    texts = opened.run("[...document.querySelectorAll('#sample .text')].slice(0, 2).map(e => e.textContent)")
    assert texts == ["one plus one", "two, I think"]
    colours = opened.run(
        "[...document.querySelectorAll('#sample .text')][1].querySelectorAll('.token').length &&"
        "[...[...document.querySelectorAll('#sample .text')][1].querySelectorAll('.token')]"
        ".map(token => getComputedStyle(token).backgroundColor)"
    )
    assert len(colours) == len("two, I think") and len(set(colours)) > 1
    title = opened.run("document.querySelectorAll('#sample .text')[1].querySelector('.token').title")
    assert title.startswith("token 1: log π = −")
    opened.run("document.querySelectorAll('#sample tbody .chip')[2].click()")
    assert "sample 3 of 3" in opened.run("document.getElementById('sample').textContent")
    assert opened.complaints() == []


def test_hostile_text_is_shown_as_text(opened: Browser) -> None:
    choose(opened, "run", "1")
    opened.run("document.querySelector('#list .chip').click()")
    texts = opened.run("[...document.querySelectorAll('#sample .text')].slice(0, 2).map(e => e.textContent)")
    assert texts == [HOSTILE, HOSTILE]
    assert opened.run("document.images.length") == 0
    assert opened.complaints() == []


def test_injected_scripts_do_not_run(opened: Browser) -> None:
    opened.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.executed = 1\">')")
    opened.run("new Promise(done => setTimeout(done, 200))")
    assert opened.run("window.executed") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints())


def test_equal_settings_are_shown_on_demand(opened: Browser) -> None:
    rows = "[...document.querySelectorAll('.settings tbody tr')]"
    visible = f"{rows}.filter(row => row.offsetHeight > 0).length"
    differing = opened.run(visible)
    assert differing == opened.run("document.querySelectorAll('.settings tr.differs').length") == 3
    opened.run("document.getElementById('all-settings').click()")
    assert opened.run(visible) > 100


def test_a_print_has_the_chosen_sample_and_no_controls(opened: Browser, tmp_path: Path) -> None:
    opened.call("Emulation.setEmulatedMedia", media="print")
    heights = opened.run(
        "['.controls', '#list', '#sample', 'nav'].map(name => document.querySelector(name).offsetHeight)"
    )
    opened.call("Emulation.setEmulatedMedia", media="")
    assert heights[0] == heights[1] == heights[3] == 0 and heights[2] > 100
    assert opened.pdf(tmp_path / "page.pdf").startswith(b"%PDF")
