"""Real WSGI servers, each in a process of its own, and the barest client there is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

HOSTS = {"gthread": "gunicorn", "waitress": "waitress", "werkzeug": "werkzeug"}  # host -> the library
JOURNAL, BURNERS = "TOKENSCOPE_BENCH_JOURNAL", "TOKENSCOPE_BENCH_BURNERS"  # how the app in there is told
PATIENCE = 15.0
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Host:
    """A running server."""

    address: tuple[str, int]
    journal: IO[bytes]

    def hear(self) -> dict[str, Any]:
        """The next line of its journal."""
        line = self.journal.readline()
        if not line:
            raise RuntimeError("the server has ended")
        return dict(json.loads(line))

    def connect(self) -> Client:
        return Client(self.address)


class Client:
    """One connection. Answers must have a Content-Length."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, path: str) -> None:
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())

    def receive(self) -> bytes:
        """The body of the next answer."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200") and not head.startswith(b"HTTP/1.0 200"):
            raise RuntimeError(f"the server said {head!r}")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while len(body) < int(lengths[0].partition(b":")[2]):
            body += self._more()
        return body

    def _more(self) -> bytes:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data


@contextlib.contextmanager
def host(kind: str, *, burners: int = 0) -> Iterator[Host]:
    """Run a server of this kind until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    read_end, write_end = os.pipe()
    with listener, os.fdopen(read_end, "rb") as journal, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            _command(kind, listener.fileno()),
            env={**os.environ, JOURNAL: str(write_end), BURNERS: str(burners), "PYTHONPATH": str(ROOT)},
            pass_fds=(listener.fileno(), write_end),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
        )
        os.close(write_end)
        try:
            running = Host(listener.getsockname(), journal)
            _expect_serving(running, log)
            yield running
        finally:
            _stop(process)


def _command(kind: str, fd: int) -> list[str]:
    if kind != "gthread":
        return [sys.executable, "-m", "bench._app", kind, str(fd)]
    return [
        *(sys.executable, "-m", "gunicorn", "bench._app:make()", "--bind", f"fd://{fd}"),
        *(
            "--workers",
            "1",
            "-k",
            "gthread",
            "--threads",
            "8",
            "--keep-alive",
            "30",
            "--graceful-timeout",
            "2",
        ),
        *("--log-level", "warning"),
    ]


def _expect_serving(running: Host, log: IO[bytes]) -> None:
    try:
        assert running.hear()["what"] == "serving"
    except RuntimeError as error:
        log.seek(0)
        error.add_note(log.read().decode(errors="replace"))
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
