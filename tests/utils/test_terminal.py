"""The terminal: any encoding shows any text, and warnings of imported packages stay out of it."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opo_megatron.utils.terminal import READABLE, is_package, prepare_terminal, readable
from tests.support.paths import ROOT

TERMINALS = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "the C locale": {"LC_ALL": "C"},
    "the C locale without UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "0"},
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in its own process, as a user starts it."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=60,
        cwd=ROOT,
    )


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    """Registers the error handler; of this process nothing else is changed, its streams being pytest's."""
    import codecs

    codecs.register_error(READABLE, readable)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("step 1 → 2", "step 1 -> 2"),
        ("|Δ log π|", "|d log pi|"),
        ("2 × 3 · 4", "2 x 3 * 4"),
        ("‖∇‖²", "||grad ||^2"),
        ("Σⱼ wⱼ − b", "sum_j w_j - b"),
        ("a – b…", "a - b..."),
        ("你好", "\\u4f60\\u597d"),
        ("café", "caf\\xe9"),
        ("\U0001f600", "\\U0001f600"),
        ("no\xa0break", "no break"),
        ("plain", "plain"),
    ],
)
def test_text_outside_of_ascii_stays_readable_and_nothing_is_lost(text: str, written: str) -> None:
    assert text.encode("ascii", READABLE).decode() == written


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "koi8-r"])
def test_every_character_of_our_own_strings_can_be_written(encoding: str) -> None:
    texts = set()
    for path in [*(ROOT / "opo_megatron").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
    characters = {character for text in texts for character in text if not "\ud800" <= character <= "\udfff"}
    assert "→" in characters and "Δ" in characters
    for character in characters:
        written = character.encode(encoding, READABLE).decode(encoding)
        assert written and (written == character or encoding != "utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_bytes_of_a_files_name_are_written_as_they_are(encoding: str) -> None:
    name = os.fsdecode(b"runs/caf\xe9")
    assert name.encode(encoding, READABLE) == b"runs/caf\xe9"


def test_what_the_user_chose_for_a_stream_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for errors, kept in (("strict", READABLE), ("replace", "replace"), ("ignore", "ignore")):
        stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors)
        monkeypatch.setattr(sys, "stdout", stream)
        prepare_terminal(shows_warnings=True)
        assert stream.errors == kept


@pytest.mark.parametrize("terminal", TERMINALS)
def test_a_printed_recipe_loads_to_the_same_text_in_any_terminal(terminal: str) -> None:
    command = ("config", "recipes/quickstart.yaml", "task.system_prompt=π → 你")
    result = run("-m", "opo_megatron", *command, **TERMINALS[terminal])
    assert (result.returncode, result.stderr) == (0, b"")
    text = result.stdout.decode("utf-8" if terminal == "the C locale" else "latin-1")
    assert yaml.safe_load(text)["task"]["system_prompt"] == "π → 你"


@pytest.mark.parametrize(
    ("command", "code"),
    [("preflight --help", 0), ("doctor", 0), ("config recipes/quickstart.yaml train.steps=→", 2)],
)
def test_no_command_dies_of_an_encoding(command: str, code: int) -> None:
    result = run("-m", "opo_megatron", *command.split(), **TERMINALS["ascii"])
    assert result.returncode == code and b"Traceback" not in result.stderr
    assert result.stderr.count(b"\n") == (code == 2) and result.stdout.isascii()


@pytest.mark.slow
@pytest.mark.parametrize("terminal", TERMINALS)
def test_training_and_planning_print_in_any_terminal(terminal: str, tmp_path: Path) -> None:
    small = ("train.steps=1", "warm_start.steps=1", "eval.problems=4", "rollout.prompts_per_step=2")
    train = ("train", "recipes/quickstart.yaml", f"run.dir={tmp_path / 'run'}", *small)
    for arguments in (train, ("plan", "recipes/quickstart.yaml")):
        result = run("-m", "opo_megatron", *arguments, **TERMINALS[terminal])
        assert (result.returncode, result.stderr) == (0, b"")


WARNINGS = """
import sys, warnings, logging
from pathlib import Path
from opo_megatron.utils.terminal import prepare_terminal
prepare_terminal(shows_warnings={shows})
sys.path.insert(0, {folder!r})
import package, grader
from opo_megatron.errors import OpoWarning
package.talk()
grader.talk()
warnings.warn("of ours", OpoWarning)
"""
TALK = """
import logging, warnings
class Own(Warning): pass
def talk():
    warnings.warn("{name} warns")
    warnings.warn("{name} warns of the future", FutureWarning)
    warnings.warn("{name} warns by itself", Own)
    logging.getLogger("{name}").warning("{name} logs a warning")
    handler = logging.StreamHandler()
    own = logging.getLogger("{name}.with_handler")
    own.addHandler(handler)
    own.propagate = False
    own.warning("{name} handles a warning")
    own.error("{name} handles an error")
"""


@pytest.mark.parametrize("shows", [False, True])
def test_warnings_of_packages_are_hidden_and_others_shown(tmp_path: Path, shows: bool) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "package.py").write_text(TALK.format(name="package"))
    (tmp_path / "grader.py").write_text(TALK.format(name="grader"))
    script = f"import sys; sys.path.append({str(tmp_path)!r})" + WARNINGS.format(
        shows=shows, folder=str(packages)
    )
    error = run("-c", script).stderr.decode()
    for words in ("warns", "warns of the future", "warns by itself", "logs a warning", "handles a warning"):
        assert f"grader {words}" in error
        assert (f"package {words}" in error) is shows
    assert "package handles an error" in error and "of ours" in error


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (yaml.__file__, True),
        (os.__file__, True),
        ("/usr/lib/python3/dist-packages/x.py", True),
        (str(ROOT / "opo_megatron" / "train.py"), False),
        ("/home/me/grader.py", False),
        ("<stdin>", False),
    ],
)
def test_a_package_is_what_is_installed_and_not_ours(file: str, expected: bool) -> None:
    assert is_package(file) is expected


def test_every_tool_that_prints_prepares_its_terminal() -> None:
    for path in sorted((ROOT / "tools").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "print(" in text or "cli.main" in text:
            assert "    prepare_terminal()\n" in text, path.name
