"""What small databases for tests have in common: they hang on cue, and remember what they were asked."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any, Self


class Database:
    """A server on a loopback port. A context manager that serves until it is left.

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

    def serve(self, sock: socket.socket) -> None:
        """Talk to one client; its end is an `EOFError`."""
        raise NotImplementedError

    def cancel(self, number: int) -> None:
        """Do as a request to cancel says."""
        self.cancels += 1
        session = self.sessions.get(number)
        if session and session.hangs and not self.deaf:
            session.cut.set()

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
            self.serve(sock)


class Session:
    """One client."""

    def __init__(self, server: Any, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.number = len(server.sessions) + 1
        self.hangs = False
        self.cut = threading.Event()
        server.sessions[self.number] = self

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def hang(self) -> None:
        """Do nothing until a request to cancel comes."""
        self.cut.clear()
        self.hangs = True
        self.server.hanging.set()
        self.cut.wait(10)
        self.hangs = False
        self.server.hanging.clear()

    def hold_commit(self) -> None:
        """Be slow to commit, if told so."""
        self.server.committing.set()
        self.server.commits.wait(10)


def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise EOFError
        data += more
    return data
