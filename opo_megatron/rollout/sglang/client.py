"""HTTP to one SGLang server: JSON in, JSON out, and what its failures mean.

A server that cannot be reached, closes the connection or does not answer has failed (`EngineFailure`): it
can be restarted.  One that compiles its kernels does not answer either, and is waited for.  A request that it
refuses is a mistake in the request (`UserError`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from opo_megatron.errors import EngineFailure, UserError

POLL_SECONDS = 1.0
"""Interval at which a server that does not answer is looked at."""


class Stream:
    """A reply that is read as it comes."""

    response: http.client.HTTPResponse

    def __init__(self, connection: http.client.HTTPConnection, socket: socket.socket) -> None:
        self._connection, self.socket = connection, socket

    def read(self) -> bytes:
        """What has come since the last call, at least a byte; empty where it has ended, whatever for."""
        try:
            return self.response.read1()
        except (OSError, ValueError, http.client.HTTPException):  # killed, or closed here meanwhile
            return b""

    def end(self) -> None:
        """End it, from any thread: `read` returns what has come, then nothing."""
        with contextlib.suppress(OSError):  # it has ended
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()
        self.response.close()


class Client:
    """One server; safe to use from several threads, each request has a connection of its own."""

    def __init__(
        self,
        url: str,
        timeout: float,
        api_key: str | None = None,
        is_compiling: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args:
        url: `http://host:port`.
        timeout: seconds without a reply after which the server counts as hung.
        is_compiling: whether it compiles its kernels: those seconds do not count.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise UserError(f"{url!r} is not the address of a server; write it as http://host:port")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._host, self._port = parts.hostname, parts.port
        self._is_compiling = is_compiling
        self._paths: frozenset[str] | None = None
        self._authorization = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def post(self, path: str, timeout: float | None = None, **body: Any) -> Any:
        """The reply to a POST.

        Raises:
            EngineFailure: no reply, a broken one, or an error inside the server.
            UserError: the server refuses the request.
        """
        status, reply = self._request("POST", path, json.dumps(body), timeout)
        return self._checked(path, status, reply)

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The reply to a GET; raises as `post` does."""
        status, reply = self._request("GET", path, None, timeout)
        return self._checked(path, status, reply)

    def stream(self, path: str) -> Stream | None:
        """The reply to a GET, read as it comes; None where the server does not have the path.

        Raises:
            EngineFailure, UserError: as `get`.
        """
        connection = self._connection(self.timeout)
        with self._failures(path, self.timeout):
            connection.request("GET", path, None, self._authorization)
            assert connection.sock is not None
            stream = Stream(connection, connection.sock)  # a reply that ends the connection takes its socket
            self._wait_for_reply(stream.socket, self.timeout)
            response = stream.response = connection.getresponse()
            if response.status == 200:
                stream.socket.settimeout(None)
                return stream
            reply = response.read()
        connection.close()
        if response.status != 404:
            self._checked(path, response.status, reply)
        return None

    def address_towards(self) -> str:
        """This machine's address on the route to the server, at which the server reaches it."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
            probe.connect((self._host, self._port))
            address: str = probe.getsockname()[0]
            return address

    def is_healthy(self) -> bool:
        """Whether the server answers at all.  Asks without the key: another process may have the port."""
        try:
            return self._request("GET", "/health", None, 5.0, with_key=False)[0] == 200
        except EngineFailure:
            return False

    def offers(self, path: str) -> bool:
        """Whether the server has this path, by which versions are distinguished."""
        if self._paths is None:
            self._paths = frozenset(self.get("/openapi.json").get("paths", {}))
        return path in self._paths

    def _request(
        self, method: str, path: str, body: str | None, timeout: float | None, with_key: bool = True
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} | (self._authorization if with_key else {})
        limit = timeout if timeout is not None else self.timeout
        with self._failures(path, limit), contextlib.closing(self._connection(limit)) as connection:
            connection.request(method, path, body, headers)
            if timeout is None:
                self._wait_for_reply(connection.sock, limit)
            response = connection.getresponse()
            return response.status, response.read()

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)

    @contextlib.contextmanager
    def _failures(self, path: str, limit: float) -> Iterator[None]:
        """Raise EngineFailure where the server does not reply."""
        try:
            yield
        except TimeoutError as error:
            raise EngineFailure(f"{self.url}{path} did not reply for {limit:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:
            what = str(error) or type(error).__name__
            raise EngineFailure(f"{self.url}{path} closed the connection ({what})") from error

    def _wait_for_reply(self, connection: socket.socket, limit: float) -> None:
        """Wait until a reply begins.

        Raises:
            TimeoutError: after `limit` seconds in which the server did not compile.
        """
        poll, waited = select.poll(), 0.0
        poll.register(connection, select.POLLIN)
        while True:
            started = time.monotonic()
            if poll.poll(1e3 * min(POLL_SECONDS, limit)):
                return
            if self._is_compiling():
                continue
            waited += time.monotonic() - started
            if waited >= limit:
                raise TimeoutError

    def _checked(self, path: str, status: int, reply: bytes) -> Any:
        text = reply.decode(errors="replace")
        if status in (401, 403):
            what = "refuses the key" if self._authorization else "asks for a key"
            raise UserError(
                f"{self.url} {what}; set rollout.sglang.api_key_file to the file that `opo serve` has, or "
                "rollout.sglang.api_key to the variable with the server's key"
            )
        if 400 <= status < 500:
            raise UserError(f"{self.url}{path} refuses the request ({status}): {_message(text)}")
        if status != 200:
            raise EngineFailure(f"{self.url}{path} failed ({status}): {_message(text)}")
        try:
            return json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            return text  # some paths reply in plain text


def _message(text: str) -> str:
    """The message of an error reply, at most one line."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = text
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(body).split())[:300]
