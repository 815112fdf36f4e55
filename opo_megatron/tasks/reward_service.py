"""Rewards from a service over HTTP: `task.verifier=http://host:port/path`.

    POST {"prompts": [text, …], "responses": [text, …], "answers": [text, …]}
    200  {"rewards": [number or null, …]}        null: the default reward, counted as a failure

Requests hold up to `task.verifier_batch` responses; `task.verifier_workers` of them are open at the same
time.  A request that is not answered in time, or with 429 or 5xx, is repeated `task.verifier_retries` times
with growing pauses; then its responses get the default reward.  Any other answer is a mistake, and ends the
run."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.user_verifier import as_reward, described

SCHEMES = ("http://", "https://")
FIRST_PAUSE_SECONDS = 0.5
"""Before the first repetition; doubles with each."""
START_SECONDS = 10.0
"""Time limit of the connection that `start` tries."""

Job = Sequence[str]
"""(prompt, response, answer)."""


class _Unanswered(Exception):
    """No answer, or one that asks to try again."""


class RewardService:
    """One service; `failures` of it are rewards of None."""

    def __init__(self, config: TaskConfig) -> None:
        self.url = config.verifier
        try:
            parts = urlsplit(self.url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.username or parts.password:
            raise UserError(
                "task.verifier has a user or a password in its address, which logs would show; name the "
                "variable of a key with task.verifier_api_key_env"
            )
        if not parts.hostname or port == 0:
            raise UserError(
                f"task.verifier={self.url} is not the address of a service; write it as http://host:port/path"
            )
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._kind, self._host, self._port = kind, parts.hostname, port or kind.default_port
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._seconds, self._batch = config.verifier_seconds, config.verifier_batch
        self._retries = config.verifier_retries
        self._headers = {"Content-Type": "application/json"}
        if config.verifier_api_key_env is not None:
            key = os.environ.get(config.verifier_api_key_env)
            if not key:
                raise UserError(
                    f"task.verifier_api_key_env={config.verifier_api_key_env} is not set in the environment; "
                    f"export {config.verifier_api_key_env}=KEY"
                )
            self._headers["Authorization"] = f"Bearer {key}"
        self._threads = ThreadPoolExecutor(config.verifier_workers, thread_name_prefix="reward")

    def start(self) -> None:
        """
        Raises:
            UserError: where nothing listens at the address.
        """
        connection = self._kind(self._host, self._port, timeout=START_SECONDS)
        try:
            connection.connect()
            connection.close()
        except OSError as error:
            raise UserError(
                f"task.verifier={self.url} cannot be reached ({error}); start the service first, or "
                "correct the address"
            ) from None

    def grade(self, jobs: Sequence[Job]) -> list[float | None]:
        """Reward of each (prompt, response, answer); None where the service gave none.

        Raises:
            UserError: for an answer that is not as documented.
        """
        batches = [jobs[start : start + self._batch] for start in range(0, len(jobs), self._batch)]
        futures = [self._threads.submit(self._graded, batch) for batch in batches]
        try:
            return [reward for future in futures for reward in future.result()]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _graded(self, batch: Sequence[Job]) -> list[float | None]:
        prompts, responses, answers = (list(column) for column in zip(*batch, strict=True))
        body = json.dumps({"prompts": prompts, "responses": responses, "answers": answers})
        for attempt in range(self._retries + 1):
            try:
                return self._rewards(self._posted(body, self._seconds * len(batch)), len(batch))
            except _Unanswered:
                if attempt < self._retries:
                    time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        return [None] * len(batch)

    def _posted(self, body: str, seconds: float) -> bytes:
        connection, deadline = self._kind(self._host, self._port, timeout=seconds), time.monotonic() + seconds
        try:
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            status, reply = response.status, _read_until(response, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise _Unanswered from error
        finally:
            connection.close()
        if status == 429 or status >= 500:
            raise _Unanswered
        if status in (401, 403):
            raise UserError(
                f"task.verifier={self.url} refuses the key ({status}); name the variable of the right one "
                "with task.verifier_api_key_env"
            )
        if status != 200:
            words = " ".join(reply.decode(errors="replace").split())[:200]
            raise UserError(
                f"task.verifier={self.url} refuses the request ({status}: {words}); see its documentation"
            )
        return reply

    def _rewards(self, reply: bytes, count: int) -> list[float | None]:
        try:
            rewards: Any = json.loads(reply)["rewards"]
            if len(rewards) != count:
                raise ValueError(f"{len(rewards)} rewards for {count} responses")
            return [None if reward is None else as_reward(reward) for reward in rewards]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f'task.verifier={self.url} replied {reply[:80]!r}, not {{"rewards": [number or null, …]}} '
                f"({described(error)}); correct the service"
            ) from None


def _read_until(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole reply; a socket's time limit is one of each piece."""
    pieces = []
    while piece := response.read1(2**16):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(pieces)
