"""A small PostgreSQL that hangs on cue: just enough of the protocol for libpq, and a memory for what it was asked.

What it knows: transactions, `SELECT 1`, and HANG (also as what a cursor fetches), which lasts until it is cancelled.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Self

_CANCEL, _TLS, _GSS = 80877102, 80877103, 80877104
_PARAMETERS = {
    "server_version": "15.0",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "DateStyle": "ISO, MDY",
    "standard_conforming_strings": "on",
    "integer_datetimes": "on",
}


class Postgres:
    """A context manager that serves until it is left.

    Attributes:
        deaf: It does not act on requests to cancel.
        hanging: Set while a session hangs.
        committing: Set when a session was asked to commit; it then waits for `commits`.
        commits: Clear it to hold up every COMMIT.
        cancels: How many requests to cancel came.
        log: Every statement, in order.
    """

    def __init__(self, *, deaf: bool = False) -> None:
        self.deaf = deaf
        self.hanging = threading.Event()
        self.committing = threading.Event()
        self.commits = threading.Event()
        self.commits.set()
        self.cancels = 0
        self.log: list[str] = []
        self.sessions: dict[int, Session] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for session in list(self.sessions.values()):
            session.cut.set()
            session.hang_up()
        for thread in self._threads:
            thread.join()

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    @property
    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=u dbname=d sslmode=disable gssencmode=disable"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _address = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                thread = threading.Thread(target=self._serve, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, EOFError):
            while True:
                (length,) = struct.unpack("!i", receive(sock, 4))
                body = receive(sock, length - 4)
                (code,) = struct.unpack("!i", body[:4])
                if code == _CANCEL:
                    self._cancel(*struct.unpack("!ii", body[4:]))
                    return
                if code in {_TLS, _GSS}:
                    sock.sendall(b"N")
                    continue
                Session(self, sock).serve()
                return

    def _cancel(self, number: int, key: int) -> None:
        self.cancels += 1
        session = self.sessions.get(number)
        if session and key == session.key and not self.deaf and session.hangs:
            session.cut.set()


class Session:
    """One client."""

    key = 4711

    def __init__(self, server: Postgres, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.number = len(server.sessions) + 1
        self.state = "I"
        self.hangs = False
        self.cut = threading.Event()
        server.sessions[self.number] = self

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def serve(self) -> None:
        self.send("R", struct.pack("!i", 0))
        for name, value in _PARAMETERS.items():
            self.send("S", f"{name}\0{value}\0".encode())
        self.send("K", struct.pack("!ii", self.number, self.key))
        self.ready()
        while (kind := receive(self.sock, 1)) != b"X":
            (length,) = struct.unpack("!i", receive(self.sock, 4))
            body = receive(self.sock, length - 4)
            assert kind == b"Q", kind
            self.query(body.rstrip(b"\0").decode())
            self.ready()

    def query(self, sql: str) -> None:
        self.server.log.append(sql)
        word = sql.split(maxsplit=1)[0].upper()
        if word in {"COMMIT", "ROLLBACK"}:
            if word == "COMMIT":
                self.server.committing.set()
                self.server.commits.wait(10)
            self.state = "I"
        elif self.state == "E":
            self.fail("25P02", "current transaction is aborted")
            return
        elif word in {"HANG", "FETCH"}:
            self.hang()
            return
        elif word == "BEGIN":
            self.state = "T"
        elif word == "SELECT":
            self.send("T", b"\0\1x\0" + struct.pack("!ihihih", 0, 0, 23, 4, -1, 0))
            self.send("D", b"\0\1" + struct.pack("!i", 1) + b"1")
        self.send("C", f"{word}\0".encode())

    def hang(self) -> None:
        self.cut.clear()
        self.hangs = True
        self.server.hanging.set()
        self.cut.wait(10)
        self.hangs = False
        self.server.hanging.clear()
        self.fail("57014", "canceling statement due to user request")

    def fail(self, code: str, message: str) -> None:
        self.send("E", f"SERROR\0VERROR\0C{code}\0M{message}\0\0".encode())
        if self.state == "T":
            self.state = "E"

    def ready(self) -> None:
        self.send("Z", self.state.encode())

    def send(self, kind: str, body: bytes) -> None:
        self.sock.sendall(kind.encode() + struct.pack("!i", len(body) + 4) + body)


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
