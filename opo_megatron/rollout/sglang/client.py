"""HTTP to one SGLang server: JSON in, JSON out, and what its failures mean.

A server that cannot be reached, breaks off or stays silent has failed (`EngineFailure`): it can be
started again.  A request that it refuses is a mistake in what was asked (`UserError`).
"""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

from opo_megatron.errors import EngineFailure, UserError


class Client:
    """One server; safe to use from several threads, each request has a connection of its own."""

    def __init__(self, url: str, timeout: float, api_key: str | None = None) -> None:
        """Args:
        url: `http://host:port`.
        timeout: seconds without an answer after which the server counts as hung.
        """
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise UserError(f"{url!r} is not the address of a server; write it as http://host:port")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._host, self._port = parts.hostname, parts.port
        self._headers = {"Content-Type": "application/json"}
        self._paths: frozenset[str] | None = None
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def post(self, path: str, timeout: float | None = None, **body: Any) -> Any:
        """The answer to a POST.

        Raises:
            EngineFailure: no answer, a broken one, or an error inside the server.
            UserError: the server refuses the request.
        """
        status, answer = self._request("POST", path, json.dumps(body), timeout)
        return self._checked(path, status, answer)

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The answer to a GET; raises as `post` does."""
        status, answer = self._request("GET", path, None, timeout)
        return self._checked(path, status, answer)

    def address_towards(self) -> str:
        """This machine's address on the way to the server, where the server can reach it back."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # sends nothing
            way.connect((self._host, self._port))
            address: str = way.getsockname()[0]
            return address

    def is_healthy(self) -> bool:
        """Whether the server answers at all."""
        try:
            return self._request("GET", "/health", None, 5.0)[0] == 200
        except EngineFailure:
            return False

    def offers(self, path: str) -> bool:
        """Whether the server knows this path, which is how older versions are told apart."""
        if self._paths is None:
            self._paths = frozenset(self.get("/openapi.json").get("paths", {}))
        return path in self._paths

    def _request(self, method: str, path: str, body: str | None, timeout: float | None) -> tuple[int, bytes]:
        limit = timeout if timeout is not None else self.timeout
        connection = http.client.HTTPConnection(self._host, self._port, timeout=limit)
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except TimeoutError as error:
            raise EngineFailure(f"{self.url}{path} gave no answer for {limit:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:
            what = str(error) or type(error).__name__
            raise EngineFailure(f"{self.url}{path} broke off ({what})") from error
        finally:
            connection.close()

    def _checked(self, path: str, status: int, answer: bytes) -> Any:
        text = answer.decode(errors="replace")
        if status in (401, 403):
            raise UserError(f"{self.url} refuses the API key; set rollout.sglang.api_key to the server's")
        if 400 <= status < 500:
            raise UserError(f"{self.url}{path} refuses the request ({status}): {_message(text)}")
        if status != 200:
            raise EngineFailure(f"{self.url}{path} failed ({status}): {_message(text)}")
        try:
            return json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            return text  # some paths answer in plain words


def _message(text: str) -> str:
    """The words of an error answer, at most a line of them."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        body = text
    if isinstance(body, dict):
        error = body.get("error", body)
        body = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(body).split())[:300]
