"""The Dockerfile, carried out without Docker: what its instructions do in a scratch folder."""

from __future__ import annotations

import json
from pathlib import Path

import check_container
import pytest
from check_container import DOCKERFILE, Image, carry_out, instructions, reason_to_leave_out

DOCKERFILE_OF_A_TEST = """\
FROM nowhere
# a comment
ARG BUILD_JOBS=8
ENV FIRST=/opt/first \\
    SECOND=$FIRST/bin
WORKDIR /build
COPY opo_megatron/environment/versions.py Makefile ./
RUN apt-get update
RUN ls > /build/listed \\
    && echo "$FIRST $SECOND ${BUILD_JOBS}" > env.txt
RUN mkdir /opt/app
RUN false
RUN touch /build/never
"""


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    file = tmp_path / "Dockerfile"
    file.write_text(DOCKERFILE_OF_A_TEST)
    monkeypatch.setattr(check_container, "DOCKERFILE", file)
    (tmp_path / "scratch" / "opt").mkdir(parents=True)
    return Image(tmp_path / "scratch", jobs=3)


def test_instructions_do_what_docker_does_inside_the_scratch_folder(image: Image) -> None:
    steps = carry_out(image, resume=False)
    build = image.scratch / "build"
    assert {"Makefile", "versions.py"} <= set((build / "listed").read_text().split())  # copied flat
    assert (build / "env.txt").read_text() == f"{image.scratch}/opt/first {image.scratch}/opt/first/bin 3\n"
    assert (image.scratch / "opt" / "app").is_dir()
    assert [step["result"].partition(":")[0] for step in steps] == ["left out", "ok", "ok", "failed"]
    assert not (build / "never").exists()


def test_resuming_repeats_only_what_did_not_work(image: Image) -> None:
    carry_out(image, resume=False)
    (image.scratch / "build" / "listed").unlink()
    steps = carry_out(image, resume=True)
    assert not (image.scratch / "build" / "listed").exists()
    assert [step["result"].partition(":")[0] for step in steps] == ["left out", "ok", "ok", "failed"]


def test_only_distribution_and_git_are_left_out_of_the_real_file() -> None:
    commands = [arguments for name, arguments in instructions(DOCKERFILE.read_text()) if name == "RUN"]
    left_out = [command.split()[0] for command in commands if reason_to_leave_out(command)]
    assert set(left_out) <= {"apt-get", "git"} and len(commands) - len(left_out) >= 4


def test_scripts_that_run_lie_where_they_were_copied() -> None:
    copied: set[str] = set()
    for name, arguments in instructions(DOCKERFILE.read_text()):
        if name == "COPY" and arguments.endswith(" ./"):
            copied |= {Path(word).name for word in arguments.split()[:-1]}
        if name == "RUN":
            scripts = [word for word in arguments.replace("(", " ").split() if word.endswith((".py", ".txt"))]
            written = {word for word in scripts if f"> {word}" in arguments}
            copied |= written
            assert {word.removeprefix("/build/") for word in scripts} <= copied, arguments


def test_a_step_that_failed_says_how_without_the_scratch_folder(image: Image) -> None:
    text = f"one\n{image.scratch}/opt/thing failed\n"
    assert check_container.last_lines(image, text) == ["one", "/opt/thing failed"]
    assert json.dumps(carry_out(image, resume=False)).count(str(image.scratch)) == 0
