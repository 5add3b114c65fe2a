"""What the story is told with: the server's process, the journal of its app, and visitors who hang up."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from fcntl import fcntl
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

#: Seconds after which something does not happen any more. Nothing in the story waits without it.
PATIENCE = 10.0


def await_until(seen: Callable[[], object], complaint: str) -> float:
    """Wait for something that nobody tells; when it was seen, monotonic."""
    end = time.monotonic() + PATIENCE
    while not seen():
        assert time.monotonic() < end, complaint
        time.sleep(0.001)
    return time.monotonic()


# Threads that the library parks on purpose, one of each kind but the first.
_PARKED = r"tokenscope-(idle|timer|watch).*"

_F_SETPIPE_SZ = 1031


class Journal:
    """What the app says (`compat.app.say`), one JSON object a line."""

    def __init__(self, fd: int, patience: float) -> None:
        self._fd = fd
        self._patience = patience
        self._rest = b""
        self._heard: list[dict[str, Any]] = []

    def expect(self, what: str, **facts: Any) -> dict[str, Any]:
        """Wait for the first entry `what` with these facts.

        Raises:
            AssertionError: It does not come.
        """
        end = time.monotonic() + self._patience
        while True:
            for entry in self._heard:
                if entry["what"] == what and facts.items() <= entry.items():
                    return entry
            if not self._hear(end - time.monotonic()):
                wanted = " ".join([what, *(f"{name}={value}" for name, value in facts.items())])
                raise AssertionError(f"the app did not say {wanted!r} within {self._patience:g} s")

    def _hear(self, timeout: float) -> bool:
        if not select.select([self._fd], [], [], max(timeout, 0))[0]:
            return False
        data = os.read(self._fd, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._heard += [json.loads(line) for line in lines]
        return bool(data)


class Server:
    """The app on a real server, in a process group of its own. A context manager that leaves nothing behind.

    Args:
        driver: The name of a module in `compat.peers`, and its arguments.
        environ: Variables for the app, besides those of this process.
        log: Where its output goes.
        patience: See `PATIENCE`.
    """

    def __init__(self, driver: Sequence[str], environ: dict[str, str], log: Path, patience: float = PATIENCE) -> None:
        self._driver = driver
        self._environ = environ
        self._log = log
        self._patience = patience
        self._own = re.compile(f"{importlib.import_module(f'compat.peers.{driver[0]}').THREADS}|{_PARKED}")

    def __enter__(self) -> Self:
        self._reading, writing = os.pipe()
        fcntl(writing, _F_SETPIPE_SZ, 1 << 20)  # the app never waits for us to read
        self.journal = Journal(self._reading, self._patience)
        name, *arguments = self._driver
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, self._log.open("wb") as out:
            self.address = listener.getsockname()
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"compat.peers.{name}", *arguments, str(listener.fileno())],
                env={**os.environ, **self._environ, "COMPAT_JOURNAL": str(writing)},
                pass_fds=(listener.fileno(), writing),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        os.close(writing)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reading)

    def visit(self, path: str, visit: str = "") -> Visitor:
        """Send a request, and keep the connection."""
        visitor = Visitor(self.address, self._patience)
        visitor.ask(path, visit)
        return visitor

    def get(self, path: str) -> tuple[int, bytes]:
        """Make a whole request, as a well-behaved client does."""
        with self.visit(path) as visitor:
            return visitor.answer()

    def census(self) -> tuple[list[str], list[str]]:
        """Return what the process holds: threads that are neither the server's nor parked; descriptors."""
        _status, body = self.get("/census")
        held = json.loads(body)
        return [name for name in held["threads"] if not self._own.fullmatch(name)], held["descriptors"]

    def shut_down(self) -> int:
        """Send SIGTERM and return the exit status.

        Raises:
            AssertionError: It does not end.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {self._patience:g} s after SIGTERM") from None

    def last_words(self) -> str:
        """Return the end of the server's log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-40:])


class Visitor:
    """A client of the app that speaks raw HTTP and goes when and how it likes. A context manager."""

    def __init__(self, address: tuple[str, int], patience: float) -> None:
        self._socket = socket.create_connection(address, timeout=patience)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, path: str, visit: str = "") -> None:
        """Send a request."""
        query = f"{'&' if '?' in path else '?'}visit={visit}" if visit else ""
        self._socket.sendall(f"GET {path}{query} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def leave(self, how: str = "fin") -> float:
        """Hang up, politely or by a reset ("rst"), and return when."""
        if how == "rst":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        at = time.monotonic()
        self._socket.close()
        return at

    def answer(self) -> tuple[int, bytes]:
        """Read one answer with a Content-Length.

        Raises:
            AssertionError: The server closed the connection, or is silent.
        """
        head = self.read_until(b"\r\n\r\n").decode("latin-1")
        length = re.search(r"(?i)^content-length: *(\d+)", head, re.MULTILINE)
        assert length, f"an answer without a length: {head!r}"
        while len(self._received) < int(length[1]):
            self._more()
        body, self._received = self._received[: int(length[1])], self._received[int(length[1]) :]
        return int(head.split(" ")[1]), body

    def read_until(self, mark: bytes) -> bytes:
        """Read up to and including a mark.

        Raises:
            AssertionError: The server closed the connection, or is silent.
        """
        while mark not in self._received:
            self._more()
        found, _, self._received = self._received.partition(mark)
        return found + mark

    def _more(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except TimeoutError:
            raise AssertionError("the server does not answer") from None
        except OSError as error:
            raise AssertionError(f"the server broke the connection: {error}") from None
        assert data, "the server closed the connection instead of answering"
        self._received += data
