"""Rewards over HTTP: wire format, repetitions, default rewards, the key, sentences for a wrong service."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks import reward_service
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.graders import Grader, Submission
from tests.support.paths import ROOT

SUBMISSIONS = [Submission(Prompt(i, f"{i}+1=", (), str(i + 1)), f"It is {i + 1 + i % 2}.") for i in range(10)]
EXPECTED = [1.0, 0.0] * 5


class Service:
    """A service whose answers are a test's: functions of a request's body to (status, reply)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.answers: list[Any] = []
        """Used up one by one; then rewards are right."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(body)
                service.keys.add(self.headers["Authorization"])
                answer = service.answers.pop(0) if service.answers else right(body)
                status, reply = answer(body) if callable(answer) else answer
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/rewards"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


def right(body: dict[str, Any]) -> tuple[int, bytes]:
    pairs = zip(body["responses"], body["answers"], strict=True)
    return 200, json.dumps({"rewards": [float(answer in response) for response, answer in pairs]}).encode()


def slow(body: dict[str, Any]) -> tuple[int, bytes]:
    time.sleep(2.0)
    return right(body)


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(reward_service, "FIRST_PAUSE_SECONDS", 0.01)
    opened = Service()
    yield opened
    opened.server.shutdown()
    opened.server.server_close()


def graded(url: str, **settings: object) -> list[float | None]:
    grader = Grader(TaskConfig(name="text", verifier=url, **{"verifier_batch": 10, **settings}))
    try:
        grader.start()
        return grader.grade(SUBMISSIONS)
    finally:
        grader.close()


def test_batches_are_posted_and_rewards_come_back_in_order(service: Service) -> None:
    assert graded(service.url, verifier_batch=3) == EXPECTED
    assert sorted(len(body["responses"]) for body in service.requests) == [1, 3, 3, 3]
    first = next(body for body in service.requests if body["prompts"][0] == "0+1=")
    assert first == {
        "prompts": ["0+1=", "1+1=", "2+1="],
        "responses": ["It is 1.", "It is 3.", "It is 3."],
        "answers": ["1", "2", "3"],
    }
    assert service.keys == {None}


@pytest.mark.parametrize("failure", [(500, b"oh"), (503, b""), (429, b"later"), slow])
def test_a_request_without_an_answer_is_repeated(service: Service, failure: Any) -> None:
    service.answers = [failure, failure]
    assert graded(service.url, verifier_seconds=0.05) == EXPECTED and len(service.requests) == 3


def test_after_the_last_repetition_responses_get_the_default(service: Service) -> None:
    service.answers = [(500, b"")] * 3
    assert graded(service.url, verifier_retries=2) == [None] * 10 and len(service.requests) == 3
    service.answers = [(200, b'{"rewards": [null, 1, 0, 0, 0, 0, 0, 0, 0, 0.5]}')]
    assert graded(service.url) == [None, 1, 0, 0, 0, 0, 0, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, b"no such path"), r"refuses the request \(404: no such path\)"),
        ((401, b""), r"refuses the key \(401\); name the variable"),
        ((200, b"fine"), "replied b'fine', not"),
        ((200, b'{"rewards": [1, 2]}'), "2 rewards for 10 responses"),
        ((200, b'{"rewards": ["1"' + b", 1" * 9 + b"]}"), "returned '1'"),
        ((200, b'{"rewards": [NaN' + b", 1" * 9 + b"]}"), "returned nan"),
        ((200, b"[1]"), "TypeError"),
    ],
)
def test_a_wrong_answer_is_one_sentence(service: Service, answer: Any, words: str) -> None:
    service.answers = [answer]
    with pytest.raises(UserError, match=words) as error:
        graded(service.url)
    assert service.url in str(error.value) and "\n" not in str(error.value)


def test_a_service_that_is_not_there_is_named_at_the_start() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=r"cannot be reached .*start the service first"):
        graded(f"http://127.0.0.1:{port}/")
    for url in ("http://", "http://host:port/", "https:///x"):
        with pytest.raises(UserError, match="is not the address of a service"):
            graded(url)


def test_the_example_service_takes_its_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "REWARD_KEY": "k3y", "PORT": port}
    example = [sys.executable, str(ROOT / "examples" / "reward_service.py")]
    process = subprocess.Popen(example, env=environment, stderr=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("MY_KEY", "k3y")
        url = f"http://127.0.0.1:{port}/rewards"
        for _ in range(100):
            try:
                assert graded(url, verifier_api_key_env="MY_KEY") == EXPECTED
                break
            except UserError:
                time.sleep(0.1)
        else:
            raise AssertionError("the example did not start")
        monkeypatch.setenv("MY_KEY", "other")
        with pytest.raises(UserError, match="refuses the key"):
            graded(url, verifier_api_key_env="MY_KEY")
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(UserError, match="MY_KEY is not set in the environment; export MY_KEY=KEY"):
            graded(url, verifier_api_key_env="MY_KEY")
    finally:
        process.kill()
        process.wait()
