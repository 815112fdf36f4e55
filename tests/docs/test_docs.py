"""The documents: their quick commands run as written, and their links and paths exist.

A fenced block whose commands run in seconds in a checkout, without a GPU, has a comment on the line before
it: `<!-- test: quick -->`, or `<!-- test: quick exit=2 -->` for another exit code.  In a block with lines
that start with `$ `, those are the commands and the others must occur in the output.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.paths import ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
README_LINES = 200
LINKED = ("tools", "recipes", "slurm", "records", "docs")
"""Folders of the checkout that the commands see, besides the package."""

_FENCE = re.compile(r"^(?P<indent> *)```")
_MARK = re.compile(r"^ *<!-- test: quick(?: exit=(?P<code>\d+))? -->$")
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")
_PATH = re.compile(
    r"(?<![\w/.-])(?:tools|recipes|slurm|records|tests|opo_megatron)/[\w./-]*\.(?:py|yaml|sh|json|png|toml)\b"
)


class Block(NamedTuple):
    """A fenced block marked as quick."""

    document: Path
    line: int
    text: str
    exit_code: int

    @property
    def name(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> str:
        """The block's commands as a shell script."""
        if not self._has_output:
            return self.text
        lines, continues = [], False
        for line in self.text.splitlines():
            if continues or line.startswith("$ "):
                lines.append(line.removeprefix("$ "))
                continues = line.endswith("\\")
        return "\n".join(lines)

    @property
    def output(self) -> list[str]:
        """Lines that the commands must print."""
        if not self._has_output:
            return []
        commands = self.commands.splitlines()
        return [line for line in self.text.splitlines() if line.removeprefix("$ ") not in commands]

    @property
    def _has_output(self) -> bool:
        return any(line.startswith("$ ") for line in self.text.splitlines())


def quick_blocks(document: Path) -> list[Block]:
    """The marked blocks of a document; fails on a mark without a block."""
    lines = document.read_text(encoding="utf-8").splitlines()
    blocks = []
    for number, line in enumerate(lines):
        mark = _MARK.match(line)
        if mark is None:
            assert not line.strip().startswith("<!-- test:"), (
                f"{document.name}:{number + 1}: the comment after `<!-- test:` is not understood"
            )
            continue
        fence = _FENCE.match(lines[number + 1])
        assert fence is not None, f"{document.name}:{number + 1}: no fenced block on the next line"
        end = next(i for i in range(number + 2, len(lines)) if _FENCE.match(lines[i]))
        text = "\n".join(part.removeprefix(fence["indent"]) for part in lines[number + 2 : end])
        blocks.append(Block(document, number + 1, text, int(mark["code"] or 0)))
    return blocks


BLOCKS = [block for document in DOCUMENTS if document.exists() for block in quick_blocks(document)]


def without_blocks(document: Path) -> str:
    """A document without its fenced blocks."""
    lines, inside = [], False
    for line in document.read_text(encoding="utf-8").splitlines():
        inside ^= _FENCE.match(line) is not None
        lines.append("" if inside else line)
    return "\n".join(lines)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A writable folder with links to the checkout's folders."""
    for name in LINKED:
        if (ROOT / name).is_dir():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=[block.name for block in BLOCKS])
def test_quick_commands_run_as_written(block: Block, checkout: Path) -> None:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OPO_TEST_DATA", "OPO_MODEL", "OPO_DATA")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    bash = shutil.which("bash")
    assert bash is not None
    result = subprocess.run(
        [bash, "-euo", "pipefail", "-c", block.commands],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == block.exit_code, f"{block.name}: exit code {result.returncode}\n{output}"
    for line in block.output:
        assert line in output.splitlines(), f"{block.name}: not printed: {line}\n{output}"


def test_the_main_documents_have_quick_commands() -> None:
    assert {block.document.name for block in BLOCKS} >= {"README.md", "CONTRIBUTING.md", "using.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=[document.name for document in DOCUMENTS])
def test_links_and_paths_of_a_document_exist(document: Path) -> None:
    missing = []
    for link in _LINK.finditer(without_blocks(document)):
        target, _, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path_of_target = (document.parent / target).resolve() if target else document
        is_line = path_of_target.suffix == ".py" and re.fullmatch(r"L\d+", anchor) is not None
        if not path_of_target.exists() or (anchor and not is_line and anchor not in anchors(path_of_target)):
            missing.append(link["target"])
    for path in _PATH.findall(document.read_text(encoding="utf-8")):
        if not (ROOT / path).exists():
            missing.append(path)
    assert not missing, f"{document.name} points to missing files or anchors: {missing}"


def anchors(document: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MkDocs generate them."""
    headings = re.findall(r"^#+ +(.+)$", without_blocks(document), flags=re.MULTILINE)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-") for text in texts}


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES


def test_every_page_is_in_the_index_and_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f": {page.name}" in navigation, page.name
        assert page.name == "index.md" or f"({page.name})" in index, page.name


def test_the_code_walkthrough_has_current_line_numbers() -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_walk.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
