"""A web server in this process, in place of SGLang's, for tests of the client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


@contextmanager
def web_server(status: int, body: str, delay: float = 0.0) -> Iterator[str]:
    """A web server that gives the same reply to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            threading.Event().wait(delay)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
