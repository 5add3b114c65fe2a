"""The demo's processes: each gets a listening socket, and ends with its stdin, so also with its parent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from http.client import HTTPConnection, HTTPException
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CannotListen", "ChildDied", "ChildServer", "end_with_parent"]

#: Seconds in which a child answers, and ends.
PATIENCE = 15.0


class ChildDied(Exception):
    """A server of the demo did not answer; the message holds its log."""


class CannotListen(Exception):
    """A port is in use, or not for us; the message says which and why."""


class ChildServer:
    """``python -m module fd *arguments`` as an HTTP server on a port of this machine. A context manager.

    Args:
        module: What to run.
        arguments: For its command line.
        port: Where; 0 for any.
        aloud: Let it write to our stderr; otherwise it writes to a log, which is shown if it dies.

    Raises:
        CannotListen: The port is in use, or not for us.
    """

    def __init__(self, module: str, *arguments: str, port: int = 0, aloud: bool = False) -> None:
        with _listen(port) as listener:
            self._log: IO[bytes] | None = None if aloud else tempfile.TemporaryFile()  # noqa: SIM115
            self.address: tuple[str, int] = listener.getsockname()
            fd = listener.fileno()
            self._process = subprocess.Popen(  # noqa: S603  # our own modules, in our own interpreter
                [sys.executable, "-m", module, str(fd), *arguments],
                stdin=subprocess.PIPE,
                stdout=self._log or sys.stderr,
                stderr=subprocess.STDOUT,
                pass_fds=(fd,),
                start_new_session=True,  # a Ctrl-C is ours to handle
            )

    @property
    def url(self) -> str:
        """Where it is."""
        return "http://{}:{}".format(*self.address)

    def ask(self, path: str) -> Any:
        """GET some JSON. The first time this also waits until the server is there.

        Raises:
            ChildDied: It does not answer.
        """
        connection = HTTPConnection(*self.address, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            return json.load(connection.getresponse())
        except (OSError, HTTPException, ValueError) as error:
            raise ChildDied(f"{self.url}{path}: {error!r}\n{self._read_log()}") from error
        finally:
            connection.close()

    def _read_log(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def wait(self) -> None:
        """Until it ends by itself."""
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._log is not None:
            self._log.close()


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=256)
    except OSError as error:
        raise CannotListen(f"cannot listen on 127.0.0.1:{port}: {os.strerror(error.errno or 0)}") from error


def end_with_parent(stop: Callable[[], object]) -> None:
    """For a thread of the child: call ``stop()`` when stdin ends."""
    while os.read(0, 1024):  # not `sys.stdin`: its lock would be held when the interpreter ends
        pass
    stop()
