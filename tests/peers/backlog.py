"""A port on which a connect hangs: the queue of the listener is full and nobody accepts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Self

_FILLERS = 4  # with a backlog of 0, Linux lets one or two in; the others are in SYN_SENT, as the next one will be
_SYN_SENT = "02"


class FullBacklog:
    """A listener that answers no further SYN. Use it as a context manager.

    Attributes:
        port: Where the next connect hangs.
    """

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.port: int = self._listener.getsockname()[1]
        self._fillers = [self._fill() for _ in range(_FILLERS)]
        self._before = self._connecting()
        return self

    def _fill(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", self.port))
        return sock

    def __exit__(self, *_: object) -> None:
        for sock in (*self._fillers, self._listener):
            sock.close()

    def url(self, path: str = "/", scheme: str = "http") -> str:
        """Return a URL whose host never accepts."""
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    def connecting(self) -> int:
        """Tell how many connects hang here, besides those that fill the queue."""
        return self._connecting() - self._before

    def _connecting(self) -> int:
        remote = f":{self.port:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]]
        return sum(row[2].endswith(remote) and row[3] == _SYN_SENT for row in rows)
