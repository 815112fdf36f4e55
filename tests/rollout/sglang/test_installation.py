"""Options of the recipe on a server's command line, and the check of their names by its own parser."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from opo_megatron.cli.main import main
from opo_megatron.config.rollout import SglangConfig
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.installation import as_words, by_their_own_names, check_options
from tests.support.servers import sglang_python

KNOWN = [["--model-path", "--model"], ["--attention-backend"], ["--tp-size", "--tp"], ["--fold", "--no-fold"]]


def interpreter(folder: Path, reply: str, code: int = 0) -> str:
    """A stand-in for SGLang's interpreter, which prints a reply and the arguments that it got."""
    path = folder / "python"
    path.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/arguments\necho {shlex.quote(reply)}\nexit {code}\n"
    )
    path.chmod(0o755)
    return str(path)


def reply(objection: str | None = None) -> str:
    return json.dumps({"options": KNOWN, "objection": objection})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_backend": "triton"}, ["--attention-backend", "triton"]),
        ({"page_size": 16, "share": 0.5}, ["--page-size", "16", "--share", "0.5"]),
        ({"flag": True, "off": False, "unset": None}, ["--flag"]),
        ({"sizes": [1, 2]}, ["--sizes", "1", "2"]),
        ({"json_args": {"a_b": 1}}, ["--json-args", '{"a_b": 1}']),
        ({"zero": 0, "empty": ""}, ["--zero", "0", "--empty", ""]),
    ],
)
def test_options_become_words_of_the_servers_command_line(options: dict[str, Any], words: list[str]) -> None:
    assert as_words(by_their_own_names(options)) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"attention_backnd": "x"},
            "attention_backnd is not an option of the installed SGLang server; did you mean",
        ),
        (
            {"attention_backend": "x", "zzz": 1},
            "options.zzz is not an option of the installed SGLang server; remove",
        ),
        ({"tp": 1, "tp_size": 2}, "options.tp and rollout.sglang.options.tp_size are one option"),
        ({"fold": False}, "options.fold is false, which SGLang writes as no_fold=true; set that"),
        ({"help": True}, "options.help is not an option"),
    ],
)
def test_an_option_that_the_servers_parser_does_not_know_is_named(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    settings = SglangConfig(python=interpreter(tmp_path, reply()), options=options)
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        check_options(settings)


def test_a_value_that_the_servers_parser_refuses_is_named(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "a line of a package\n" + reply("argument --tp: invalid int value: 'x'"))
    with pytest.raises(UserError, match=r"refuses \(argument --tp: invalid int value: 'x'\); change it"):
        check_options(SglangConfig(python=python, options={"tp": "x"}))
    assert (tmp_path / "arguments").read_text().split()[1:] == ["--check-options", "--tp", "x"]


@pytest.mark.parametrize("answer", ["", "no JSON", "3", "Traceback", "[]"])
def test_an_environment_that_cannot_be_asked_is_not_an_error(tmp_path: Path, answer: str) -> None:
    check_options(SglangConfig(python=interpreter(tmp_path, answer, code=1), options={"x": 1}))
    check_options(SglangConfig(python=str(tmp_path / "none"), options={"x": 1}))


def test_without_options_nothing_is_asked(tmp_path: Path) -> None:
    check_options(SglangConfig(python=interpreter(tmp_path, reply())))
    assert not (tmp_path / "arguments").exists()


@pytest.mark.parametrize("command", ["train", "serve"])
def test_a_wrong_option_is_named_before_anything_is_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"run: {{dir: {tmp_path}/out}}\npolicy: {{model: {{vocab_size: 17}}}}\nrollout: {{engine: sglang}}"
    )
    overrides = [
        f"rollout.sglang.python={interpreter(tmp_path, reply())}",
        "rollout.sglang.options.atention_backend=x",
    ]
    port = ["--port", "30000"] if command == "serve" else []
    assert main([command, str(recipe), *overrides, *port]) == 2
    assert "did you mean attention_backend?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_server_knows_its_options() -> None:
    python = sglang_python()
    check_options(SglangConfig(python=python, options={"attention_backend": "triton", "log_requests": True}))
    wrong: dict[str, dict[str, Any]] = {
        "did you mean attention_backend": {"attention_backnd": "triton"},
        "invalid choice: 'tritn'": {"attention_backend": "tritn"},
        "unrecognized arguments": {"log_requests": 3},
    }
    for words, options in wrong.items():
        with pytest.raises(UserError, match=words):
            check_options(SglangConfig(python=python, options=options))
