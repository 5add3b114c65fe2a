"""One request served by hand, step by step, as a server does; its client is one end of a socket pair."""

from __future__ import annotations

import io
import socket
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable


class Exchange:
    """A request in the making. `with Exchange(app, "POST", "/x") as ask: ask.call(); ask.rest()`."""

    def __init__(self, app: Any, method: str = "GET", path: str = "/", **environ: Any) -> None:
        self.server, self.client = socket.socketpair()
        self.app = app
        self.status = ""
        self.headers: dict[str, str] = {}
        self.told = 0  # how often the server's start_response was called
        self.written = b""
        self.body: Iterable[bytes] = ()
        self.environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SERVER_NAME": "test",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "tokenscope.connection_fd": self.server,
            **environ,
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.server.close()
        self.client.close()

    def hang_up(self) -> None:
        self.client.close()

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self.told += 1
        self.status, self.headers = status, dict(headers)
        return self._write

    def _write(self, data: bytes) -> None:
        self.written += data

    def call(self) -> Exchange:
        """Call the app."""
        self.body = self.app(self.environ, self.start_response)
        return self

    def rest(self) -> bytes:
        """Read what is left of the body, and close it."""
        try:
            return b"".join(self.body)
        finally:
            self.close()

    def close(self) -> None:
        close = getattr(self.body, "close", None)
        if close is not None:
            close()

    def serve(self) -> bytes:
        """All of it."""
        return self.call().rest()
