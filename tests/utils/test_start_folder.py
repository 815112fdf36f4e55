"""Relative paths keep the meaning that they had when a command was started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opo_megatron.errors import UserError
from opo_megatron.utils.start_folder import absolute, shown, started_here, to_open


@pytest.mark.parametrize(
    "path", ["runs/first", "../data.jsonl", "-x/--y", 'it\'s "é" $HOME', "a b/[c]*", ".", "~/data"]
)
def test_a_path_is_that_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (tmp_path / "start").mkdir()
    monkeypatch.chdir(tmp_path / "start")
    with started_here():
        assert to_open(path) == Path(path)  # as the user wrote it
        os.chdir(tmp_path)
        assert absolute(path) == to_open(path) == tmp_path / "start" / path
        assert absolute(absolute(path)) == absolute(path)
        assert path.startswith("..") or shown(absolute(path)) == str(Path(path))
        with started_here():
            assert absolute(path) == tmp_path / path
        assert absolute(path) == tmp_path / "start" / path
    assert absolute(path) == tmp_path / path


def test_a_folder_that_is_gone_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the current folder no longer exists; change to another one"):
        started_here().__enter__()
