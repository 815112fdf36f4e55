"""A headless Chromium, driven by the DevTools protocol over a pipe: no port, no driver, no package.

Chromium reads commands on file descriptor 3 and writes replies and events on 4, as NUL-terminated JSON.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.requirements import program

INSTALL = "make setup-system (as root), or apt-get install chromium"
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars",
    "--disable-background-networking", "--disable-dev-shm-usage",
)  # fmt: skip
SECONDS = 60.0


class Browser:
    """One page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number, self._pending = 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The reply to a command; events received meanwhile are appended to `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                result: dict[str, Any] = reply["result"]
                return result
            self.events.append(reply)

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no message from the browser for {SECONDS:.0f} s"
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "the browser has ended"
            self._pending += chunk
        message, _, self._pending = self._pending.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        return event

    def open(self, page: Path, width: int = 1440, height: int = 900) -> None:
        """Load a file and wait for its load event."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, f"{script}: {reply['exceptionDetails']}"
        return reply["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, and requests for anything but the page itself."""
        problems = []
        for event in self.events:
            method, parameters = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                problems.append(json.dumps(parameters["exceptionDetails"]))
            elif method == "Log.entryAdded" or (
                method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning")
            ):
                problems.append(json.dumps(parameters))
        requests = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return problems + [f"requested {event['params']['request']['url']}" for event in requests[1:]]

    def picture(self, path: Path) -> bytes:
        """A screenshot as PNG."""
        content = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        path.write_bytes(content)
        return content

    def pdf(self, path: Path) -> bytes:
        """The printed page."""
        reply = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        content = base64.b64decode(reply["data"])
        path.write_bytes(content)
        return content


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a new profile; skips the test without Chromium."""
    chromium = program("chromium", INSTALL)
    read_commands, to_browser = os.pipe()
    from_browser, write_replies = os.pipe()
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # required as root
    command = [str(chromium), *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"]
    redirect = f'exec "$@" 3<&{read_commands} 4>&{write_replies}'
    with (profile.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-c", redirect, "bash", *command], stdout=log, stderr=log,
            pass_fds=(read_commands, write_replies),
        )  # fmt: skip
    os.close(read_commands)
    os.close(write_replies)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
