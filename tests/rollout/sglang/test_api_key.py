"""Where the key of SGLang servers comes from, and that it goes nowhere else."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from opo_megatron.cli.main import main
from opo_megatron.config import Config, load_config, to_yaml
from opo_megatron.config.compare import changed_settings
from opo_megatron.errors import UserError
from opo_megatron.rollout.sglang.api_key import random_key, shared_key
from opo_megatron.rollout.sglang.server import Server
from tests.support.cli_errors import refused
from tests.support.fixtures import RECIPE, small_config

SECRET = "hunter2-of-the-test"
NAMED = "rollout.sglang.api_key=${oc.env:SERVER_KEY}"


def config_with(*overrides: str) -> Config:
    return small_config("rollout.engine=sglang", *overrides)


@pytest.fixture
def server_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", SECRET)


def test_every_server_has_a_random_key_unless_the_recipe_names_one(server_key: None, tmp_path: Path) -> None:
    def key(*overrides: str) -> str:
        return Server(config_with(*overrides), tmp_path, tmp_path / "log", "server", None).key

    assert len({key(), key(), random_key()}) == 3 and min(map(len, (key(), random_key()))) >= 32
    assert key(NAMED) == SECRET
    file = f"rollout.sglang.api_key_file={tmp_path}/new/key"
    assert key(file) == key(file) != key() and key(file, NAMED) == SECRET


def test_a_configuration_names_the_key_and_never_holds_it(
    server_key: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_with(NAMED)
    text = to_yaml(config)
    assert "api_key: ${oc.env:SERVER_KEY}\n" in text and SECRET not in text + repr(config)
    (tmp_path / "config.yaml").write_text(text)
    again = load_config(tmp_path / "config.yaml", [], 1)
    assert again == config and shared_key(again.rollout.sglang) == SECRET
    assert main(["config", str(RECIPE), "rollout.engine=sglang", NAMED]) == 0
    assert SECRET not in capsys.readouterr().out


def test_a_resumed_run_does_not_show_keys_of_earlier_recipes(server_key: None, tmp_path: Path) -> None:
    old = to_yaml(config_with(NAMED)).replace("${oc.env:SERVER_KEY}", "a-key-as-older-recipes-have")
    (tmp_path / "config.yaml").write_text(old.replace("steps: 1", "steps: 2", 1))
    assert "a-key" not in str(changed_settings(config_with(), tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (SECRET, "does not name a variable, and a key itself has no place in recipes"),
        ("''", "does not name a variable"),
        ("1234567", "does not name a variable"),
        ("${oc.env:SERVER_KEY}x", "does not name a variable"),
        ("${oc.env:SERVER_KEY,hunter2-of-the-test}", "does not name a variable"),
        ("${task.template}", "does not name a variable"),
        (
            "${oc.env:NO_SUCH_KEY}",
            "the environment variable NO_SUCH_KEY is not set; export NO_SUCH_KEY=VALUE",
        ),
        ("${oc.env:EMPTY_KEY}", "the environment variable EMPTY_KEY holds no key, which is printable ASCII"),
        ("${oc.env:SPACED_KEY}", "SPACED_KEY holds no key"),
        ("${oc.env:LINES_KEY}", "LINES_KEY holds no key"),
        ("${oc.env:PLAIN}", "the variable PLAIN, whose name does not say so, and verifiers would get it"),
    ],
)
def test_what_names_no_key_is_one_sentence_without_it(
    key: str,
    words: str,
    server_key: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("EMPTY", ""), ("SPACED", f"{SECRET} x"), ("LINES", f"{SECRET}\n")):
        monkeypatch.setenv(f"{name}_KEY", value)
    monkeypatch.setenv("PLAIN", SECRET)
    error = refused(capsys, "config", str(RECIPE), "rollout.engine=sglang", f"rollout.sglang.api_key={key}")
    assert words in error and "rollout.sglang.api_key" in error and SECRET not in error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("REWARD", "takes the key from the variable REWARD, whose name does not say so"),
        ("MAX_TOKENS", "call it MAX_TOKENS_KEY"),
        ("hunter2-of-the-test", "is not the name of a variable; export NAME_KEY=…"),
        ("Bearer x", "is not the name of a variable"),
        ("${oc.env:SERVER_KEY}", "is not the name of a variable"),
    ],
)
def test_the_variable_of_a_reward_services_key_says_that_it_is_one(
    name: str, words: str, server_key: None, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, "config", str(RECIPE), f"task.verifier_api_key_env={name}")
    assert words in error and "task.verifier_api_key_env" in error and SECRET not in error


@pytest.mark.parametrize("option", ["api_key", "api-key", "admin_api_key", "host", "port", "--port"])
def test_options_that_the_run_sets_are_one_sentence(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(
        capsys,
        "config",
        str(RECIPE),
        "rollout.engine=sglang",
        f"rollout.sglang.options={{{option}: {SECRET}}}",
    )
    name = option.replace("-", "_").strip("_")
    assert f"rollout.sglang.options.{name} " in error and SECRET not in error


def test_a_key_file_is_for_its_owner_and_made_once(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "key"
    settings = config_with(f"rollout.sglang.api_key_file={path}").rollout.sglang
    keys: list[str | None] = []
    threads = [threading.Thread(target=lambda: keys.append(shared_key(settings, True))) for _ in range(8)]
    previous = os.umask(0)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.umask(previous)
    assert len(keys) == 8 and len(set(keys)) == 1 and keys[0] == path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [file.name for file in path.parent.iterdir()] == [
        "key"
    ]
    assert shared_key(settings) == keys[0]


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0, "does not exist; start the servers first, by `opo serve` with the same file"),
        (SECRET, 0o644, "may be opened by others (its mode is 0644); delete it"),
        (SECRET, 0o640, "may be opened by others (its mode is 0640)"),
        (SECRET, 0o602, "may be opened by others (its mode is 0602)"),
        ("", 0o600, "does not hold a key, which is one line of printable ASCII"),
        ("two\nlines", 0o600, "does not hold a key"),
        ("schlüssel", 0o600, "does not hold a key"),
        ("folder", 0, "cannot be used (Is a directory); name a file of your own"),
    ],
)
def test_a_file_that_holds_no_key_is_one_sentence(
    content: str | None, mode: int, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    if content == "folder":
        path.mkdir(mode=0o700)
    elif content is not None:
        path.write_text(content)
        path.chmod(mode)
    settings = config_with(f"rollout.sglang.api_key_file={path}").rollout.sglang
    with pytest.raises(UserError) as error:
        shared_key(settings)
    message = str(error.value)
    assert words in message and f"rollout.sglang.api_key_file={path}" in message and SECRET not in message


def test_the_key_is_neither_an_argument_nor_a_variable_of_a_server(server_key: None, tmp_path: Path) -> None:
    server = Server(config_with(NAMED), tmp_path, tmp_path / "log", "server", None)
    assert SECRET not in " ".join(server.arguments(1)) and "SERVER_KEY" not in server.environment()
