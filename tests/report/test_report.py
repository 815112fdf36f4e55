"""The report: arms, bands and results against numpy; a complete page; hostile text is escaped."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import opo_megatron
from opo_megatron.cli.main import main
from opo_megatron.report.arms import MAX_POINTS, band, bin_size, binned, differing_keys, group_runs, mean_of
from opo_megatron.report.page import as_script_data
from opo_megatron.report.rollouts import choose_steps, shares, token_texts
from opo_megatron.report.runs import leave_out_empty, read_runs, short_names
from opo_megatron.tasks import decoder
from tests.support.fake_runs import BYTES, HOSTILE, make_run
from tests.support.requirements import require

EXTRA = "pip install -e '.[report]'"


def four_runs(folder: Path) -> list[Path]:
    """Two arms of two seeds, with the seeds of an arm not adjacent."""
    return [
        make_run(folder / f"{baseline}-{seed}", f"algorithm.baseline={baseline}", f"run.seed={seed}")
        for seed in (1, 2)
        for baseline in ("opo", "rloo")
    ]


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The page of a report that must succeed; the last argument is its path, after `--out`."""
    code = main(["report", *map(str, arguments)])
    assert code == 0, capsys.readouterr().err
    return Path(arguments[-1]).read_text()


def rejected(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence that a rejected report prints."""
    assert main(["report", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_runs_that_differ_in_seed_and_folder_are_one_arm(tmp_path: Path) -> None:
    arms = group_runs(read_runs(four_runs(tmp_path)))
    assert [arm.name for arm in arms] == ["baseline=opo", "baseline=rloo"]
    assert [[run.name for run in arm.runs] for arm in arms] == [["opo-1", "opo-2"], ["rloo-1", "rloo-2"]]
    assert differing_keys(arms) == ["algorithm.baseline", "algorithm.weight", "algorithm.leave_one_out"]


def test_an_arm_is_named_by_the_fewest_settings_that_distinguish_it(tmp_path: Path) -> None:
    changes = (("optimizer.lr=1e-4",), ("warm_start.lr=1e-4",), ("optimizer.lr=1e-4", "warm_start.lr=1e-4"))
    folders = [make_run(tmp_path / f"{i}", *change) for i, change in enumerate(changes)]
    assert [arm.name for arm in group_runs(read_runs(folders))] == [
        "warm_start.lr=0.002, optimizer.lr=0.0001",
        "warm_start.lr=0.0001, optimizer.lr=0.0003",
        "warm_start.lr=0.0001, optimizer.lr=0.0001",
    ]


def test_run_names_are_the_shortest_unique_paths() -> None:
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]


def test_a_band_is_mean_min_and_max_at_the_steps_that_all_runs_have(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / f"{seed}", f"run.seed={seed}") for seed in (1, 2)]
    folders.append(make_run(tmp_path / "3", "run.seed=3", steps=3))
    runs = read_runs(folders)
    (arm,) = group_runs(runs)
    curve_band = band(arm, "reward/mean")
    assert curve_band is not None and curve_band.runs == 3
    series = [run.series("reward/mean") for run in runs]
    values = np.array([[one[step] for step in (1, 2, 3)] for one in series])
    assert curve_band.steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(curve_band.mean, np.mean(values, axis=0), rtol=1e-15)
    np.testing.assert_array_equal(curve_band.low, np.amin(values, axis=0))
    np.testing.assert_array_equal(curve_band.high, np.amax(values, axis=0))
    for (steps, tail), one in zip(curve_band.tails, series[:2], strict=True):
        assert steps.tolist() == [3, 4, 5, 6] and tail.tolist() == [one[step] for step in (3, 4, 5, 6)]
    assert band(arm, "eval/none") is None


def test_long_curves_are_means_of_bins_and_maxima_stay_maxima() -> None:
    count = 2 * MAX_POINTS + 1
    assert bin_size(count) == 3 and bin_size(MAX_POINTS) == 1
    values = np.random.default_rng(0).normal(size=count)
    steps, means = binned(np.arange(count, dtype=float), values, 3, "reward/mean")
    _, maxima = binned(np.arange(count, dtype=float), values, 3, "on_policy/logprob_diff_max")
    bins = [values[begin : begin + 3] for begin in range(0, count, 3)]
    np.testing.assert_allclose(means, [one.mean() for one in bins], rtol=1e-12)
    np.testing.assert_array_equal(maxima, [one.max() for one in bins])
    assert steps.tolist() == [*range(2, count, 3), count - 1]


@pytest.mark.parametrize("count", [2, 3, 8, 31])
def test_the_half_width_is_that_of_students_t_interval(count: int) -> None:
    scipy_stats = require("scipy.stats", "pip install -e '.[dev]'")
    values = np.random.default_rng(count).normal(size=count)
    interval = mean_of(values.tolist())
    half = scipy_stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    assert interval.half_width == pytest.approx(half, rel=2e-4)  # the table has three decimals
    assert interval.value == pytest.approx(values.mean()) and interval.runs == count
    assert mean_of([0.25]) == (0.25, None, 1)


def test_shown_groups_come_from_first_middle_and_last_step_of_all_runs() -> None:
    assert shares(64, 3) == [22, 21, 21] and shares(1, 3) == [1, 0, 0]
    assert choose_steps(range(10, 60, 10), 22) == {10: 7, 30: 7, 50: 8}
    assert choose_steps([10, 20, 30], 1) == {30: 1}
    assert choose_steps([10], 5) == {10: 5}
    assert choose_steps([], 5) == choose_steps([10], 0) == {}


def test_token_texts_join_to_the_text_and_split_no_character() -> None:
    text = "π = 3.14 🙂 ok"
    texts = token_texts([*text.encode(), 256], decoder("text", "bytes"))
    assert "".join(texts) == text and "🙂" in texts and texts[-1] == ""
    assert token_texts([*"π".encode()][:1], decoder("text", "bytes")) == ["\ufffd"]


def test_a_token_keeps_the_leading_space_that_a_decoder_strips() -> None:
    pieces = ["▁one", "▁two", "!"]

    def decode(tokens: list[int]) -> str:
        return "".join(pieces[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    assert token_texts([0, 1, 2, 1], decode) == ["one", " two", "!", " two"]


class Page(HTMLParser):
    """A parsed page: tags, attributes, text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: str | None = None
        self.data: dict = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._inside == "data":
            self.data = json.loads(data)
        elif self._inside is None:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


def test_a_page_has_all_its_sections_and_one_picture_per_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib", EXTRA)
    out = tmp_path / "new" / "page.html"
    html = report(capsys, *four_runs(tmp_path), "--png", tmp_path / "png", "--rollouts", "12", "--out", out)
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    sections = [attributes.get("id") for tag, attributes in page.tags if tag == "section"]
    assert sections == [
        "runs", "results", "paired", "held-out-problems", "training-batches", "on-policyness", "time",
        "settings", "rollouts",
    ]  # fmt: skip
    figures = sum(tag == "svg" for tag, _ in page.tags)
    pictures = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert figures == len(pictures) and {"eval_accuracy.png", "time_by_phase.png"} <= set(pictures)
    assert len(page.data["groups"]) == 12 and {group["run"] for group in page.data["groups"]} == {0, 1, 2, 3}
    assert "algorithm.leave_one_out" in page.text and "6 of 6" in page.text
    # OPO's reward at the start: the first step of both seeds.
    first = [run.series("reward/mean")[1] for run in read_runs([tmp_path / "opo-1", tmp_path / "opo-2"])]
    half = 12.706 * np.std(first, ddof=1) / np.sqrt(2)
    assert f"{np.mean(first):.3f} ± {half:.3f}" in page.text


def test_a_page_loads_no_external_resource(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("matplotlib", EXTRA)
    html = report(capsys, make_run(tmp_path / "a"), "--out", tmp_path / "page.html")
    for tag, attributes in Page(html).tags:
        links = [value or "" for name, value in attributes.items() if name in ("src", "href", "xlink:href")]
        assert all(link.startswith("#") for link in links), (tag, links)
    assert not re.search(r"url\((?!#)|@import", html)


def test_every_internal_reference_of_a_page_has_its_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib", EXTRA)
    html = report(capsys, make_run(tmp_path / "a"), "--out", tmp_path / "page.html")
    ids = {attributes.get("id") for _, attributes in Page(html).tags}
    targets = set(re.findall(r'(?:href="|url\()#([^")]+)', html))
    assert len(targets) > 20 and targets <= ids


def test_the_same_runs_give_the_same_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("matplotlib", EXTRA)
    run = make_run(tmp_path / "a")
    pages = [report(capsys, run, "--out", tmp_path / name) for name in ("1.html", "2.html")]
    assert pages[0] == pages[1]


def test_hostile_text_is_shown_and_not_interpreted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib", EXTRA)
    runs = [
        make_run(tmp_path / f"<b>{template[:2]}", *BYTES, f"task.template={template}", texts=texts)
        for template, texts in (("{prompt}", (HOSTILE, HOSTILE)), (f"{HOSTILE}{{prompt}}", ("a", "b")))
    ]
    rows = (runs[0] / "metrics.jsonl").read_text() + json.dumps({"step": 7, f"eval/{HOSTILE}": 1.0}) + "\n"
    (runs[0] / "metrics.jsonl").write_text(rows)
    html = report(capsys, *runs, "--out", tmp_path / "page.html")
    page = Page(html)
    assert "img" not in {tag for tag, _ in page.tags} and not any("onerror" in a for _, a in page.tags)
    assert html.count("<script") == html.count("</script>") == 2
    assert HOSTILE in page.text, "an arm's name, a setting"
    group = page.data["groups"][0]
    assert "".join(page.data["texts"][number] for number in group["prompt"]) == HOSTILE


def test_script_data_cannot_end_its_element() -> None:
    text = as_script_data({"a": HOSTILE, "b": "\u2028"})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": HOSTILE, "b": "\u2028"}


def test_incomplete_runs_can_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("matplotlib", EXTRA)
    whole = make_run(tmp_path / "whole")
    unfinished = make_run(tmp_path / "young", "run.seed=2", steps=1, evaluated=False)
    for path in (unfinished / "rollouts").iterdir():
        path.unlink()
    with (unfinished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward/me')  # a partial line
    (resumed := make_run(tmp_path / "resumed", "run.seed=3")).joinpath("metrics.jsonl").write_text(
        (whole / "metrics.jsonl").read_text().replace('"run/attempt": 1', '"run/attempt": 4')
    )
    html = report(capsys, whole, unfinished, resumed, "--out", tmp_path / "page.html")
    text = Page(html).text
    assert "1 of 6, unfinished" in text and "young has no rollouts" in text and "2 of 3 runs" in text
    lone = Page(report(capsys, unfinished, "--rollouts", "0", "--out", tmp_path / "lone.html"))
    assert lone.data["groups"] == [] and "There is one arm" in lone.text


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert "is not the folder of a run" in rejected(capsys, tmp_path / "none")
    assert "is not the folder of a run" in rejected(capsys, run, tmp_path / "empty")
    assert "is named twice" in rejected(capsys, run, run.parent / "." / "a")
    assert "does not end with .html" in rejected(capsys, run, "--out", tmp_path / "page.pdf")
    assert "is a folder" in rejected(capsys, run, "--out", tmp_path)
    assert "is not a number of prompts" in rejected(capsys, run, "--rollouts", "-1")
    assert "examples" in rejected(capsys)


WITHOUT_ROWS: dict[str, str | None] = {
    "no file": None,
    "an empty file": "",
    "half a row": '{"step": 0',
    "half a row of many bytes": '{"step": 0, "reward/mean": 0.' + "5" * 5000,
    "a warm start so far": None,
}


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_a_run_without_rows_is_left_out_and_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, empty = make_run(tmp_path / "full", steps=1), make_run(tmp_path / "empty", steps=1)
    (empty / "metrics.jsonl").unlink()
    if (content := WITHOUT_ROWS[name]) is not None:
        (empty / "metrics.jsonl").write_text(content)
    if name == "a warm start so far":
        (empty / "warm_start.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    lines: list[str] = []
    runs = leave_out_empty(read_runs([full, empty]), lines.append)
    assert [run.path for run in runs] == [full]
    assert lines == [f"{empty} is left out: its metrics.jsonl has no row yet"]
    message = rejected(capsys, empty)
    assert f"no metrics.jsonl of {empty} has a row yet; wait for the first step" in message


def test_a_report_of_some_runs_says_which_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("matplotlib", EXTRA)
    full, empty = make_run(tmp_path / "full", steps=1), make_run(tmp_path / "empty", steps=1)
    (empty / "metrics.jsonl").write_text("")
    page = report(capsys, full, empty, "--rollouts", "0", "--out", tmp_path / "p.html")
    captured = capsys.readouterr()
    assert captured.err == f"{empty} is left out: its metrics.jsonl has no row yet\n"
    assert "runs 1, arms 1" in captured.out and str(empty) not in page


def test_broken_files_are_named_with_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("matplotlib", EXTRA)
    run = make_run(tmp_path / "a")
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    lines = whole.splitlines(keepends=True)
    metrics.write_text("".join([*lines[:2], '{"step": 2, "rew\n', *lines[3:]]))
    assert f"{metrics} line 3 is not JSON" in rejected(capsys, run)
    metrics.write_text(whole + "[1, 2]\n")
    assert f"{metrics} line 8 has no step" in rejected(capsys, run)
    metrics.write_text(whole)
    broken = run / "rollouts" / "step_00000006.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    assert f"{broken} is not a complete rollout file" in rejected(capsys, run, "--out", tmp_path / "p.html")
    (run / "config.yaml").write_text("a: [")
    assert "config.yaml is not YAML" in rejected(capsys, run)


def test_without_matplotlib_one_sentence_names_the_install_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = rejected(capsys, make_run(tmp_path / "a"), "--out", tmp_path / "p.html")
    assert "opo report needs matplotlib" in message and "opo-megatron[report]" in message


def test_training_does_not_import_the_report() -> None:
    package = Path(opo_megatron.__file__).parent
    importing = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "opo_megatron.report" in path.read_text() and path.parent.name != "report"
    }
    assert importing == {"cli/report.py"}
    code = "import sys, opo_megatron.cli.main; print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_an_installation_has_the_page_template_files(tmp_path: Path) -> None:
    require("setuptools", EXTRA)
    root = Path(opo_megatron.__file__).parents[1]
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    source, built = root / "opo_megatron", tmp_path / "opo_megatron"
    parts = [path.relative_to(source) for path in source.rglob("*.*") if path.suffix not in (".py", ".pyc")]
    assert {"page.html", "page.css", "page.js"} <= {part.name for part in parts}
    assert all((built / part).read_bytes() == (source / part).read_bytes() for part in parts)
