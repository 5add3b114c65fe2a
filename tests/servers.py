"""Real WSGI servers, each in a process of its own, and clients that misbehave on purpose.

`serve("waitress", "folder/file.py:factory", ...)` starts a server on a free port. The factory gets
`say(what, **facts)`, which writes a line into the server's journal, and returns the WSGI app. The test reads
the journal (`expect`) instead of sleeping.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from fcntl import fcntl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("gunicorn-sync", "gunicorn-gthread", "waitress", "werkzeug", "wsgiref")
THREADED = tuple(kind for kind in KINDS if kind != "gunicorn-sync")
KEEP_ALIVE = ("gunicorn-gthread", "waitress")

# Seconds that anything in here may take before it counts as hanging.
PATIENCE = 10.0

THREADS = 16
_F_SETPIPE_SZ = 1031
_TESTS = Path(__file__).parent
_APP, _JOURNAL = "TOKENSCOPE_TEST_APP", "TOKENSCOPE_TEST_JOURNAL"

Say = "Callable[..., None]"


class Journal:
    """What the server's app said, one JSON object a line."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._heard: list[dict[str, Any]] = []

    def expect(self, what: str, *, within: float = PATIENCE, **facts: Any) -> dict[str, Any]:
        """Return (and take out) the first entry `what` with these facts; fail if it does not come in time."""
        end = time.monotonic() + within
        while True:
            for entry in self._heard:
                if entry["what"] == what and facts.items() <= entry.items():
                    self._heard.remove(entry)
                    return entry
            if not self._hear(end - time.monotonic()):
                raise AssertionError(f"no {what!r} with {facts} within {within} s; heard: {self._heard}")

    def so_far(self) -> list[dict[str, Any]]:
        """Return (and take out) all that was said until now."""
        while self._hear(0):
            pass
        heard, self._heard = self._heard, []
        return heard

    def _hear(self, timeout: float) -> bool:
        if not select.select([self._fd], [], [], max(timeout, 0))[0]:
            return False
        data = os.read(self._fd, 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._heard += [json.loads(line) for line in lines]
        return bool(data)


@dataclasses.dataclass
class Server:
    """A running server."""

    kind: str
    address: Any
    process: subprocess.Popen[bytes]
    journal: Journal
    log: Path

    def connect(self) -> Client:
        return Client(self.address)

    def ask(self, path: str, method: str = "GET") -> Answer:
        """Send one request of a well-behaved client and read all of its answer."""
        with self.connect() as client:
            client.send(method, path, {"Connection": "close"})
            return client.read_answer()

    def expect(self, what: str, **facts: Any) -> dict[str, Any]:
        try:
            return self.journal.expect(what, **facts)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- log of {self.kind}:\n{self.log.read_text()}") from None


@dataclasses.dataclass
class Answer:
    """What a client got. `complete` is False where the connection broke in the middle."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True


class Client:
    """A client that speaks raw HTTP, and goes when and how it likes."""

    def __init__(self, address: Any) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.socket = socket.socket(family)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(address)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> None:
        """Send a request; `headers` may announce more body than there is."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
        headers = dict(headers or {})
        if method in {"POST", "PUT"}:
            headers.setdefault("Content-Length", str(len(body or b"")))
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + (body or b""))

    def leave(self, how: str = "fin") -> None:
        """Hang up: `fin` closes cleanly, `rst` resets, `half` only stops sending."""
        if how == "half":
            self.socket.shutdown(socket.SHUT_WR)
            return
        if how == "rst":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def read_answer(self) -> Answer:
        """Read one whole answer, whatever its framing."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1")
        status_line, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        answer = Answer(int(status_line.split()[1]), headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            answer.complete, answer.body = self._read_chunks()
        elif "content-length" in headers:
            answer.body = self._read_exactly(int(headers["content-length"]))
        else:
            answer.body = self._read_to_the_end()
        return answer

    def read_until(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            self._more()
        found, _, self._rest = self._rest.partition(mark)
        return found + mark

    def _read_exactly(self, size: int) -> bytes:
        while len(self._rest) < size:
            self._more()
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def _read_chunks(self) -> tuple[bool, bytes]:
        body = b""
        try:
            while size := int(self.read_until(b"\r\n"), 16):
                body += self._read_exactly(size)
                self._read_exactly(2)
            self._read_exactly(2)
        except ConnectionError:
            return False, body
        return True, body

    def _read_to_the_end(self) -> bytes:
        with contextlib.suppress(ConnectionError):
            while True:
                self._more()
        return self._rest

    def _more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError(f"the server closed the connection after {self._rest!r}")
        self._rest += data


@contextlib.contextmanager
def serve(
    kind: str, app: str, folder: Path, *, unix: bool = False, env: dict[str, str] | None = None
) -> Iterator[Server]:
    """Run the app on a real server of this kind until the block ends; the log goes to `folder`."""
    listener, address = _listen(folder if unix else None)
    read_end, write_end = os.pipe()
    fcntl(write_end, _F_SETPIPE_SZ, 1 << 20)  # the server must never wait for a test that reads late
    log = folder / f"{kind}.log"
    try:
        with listener, log.open("wb") as out:
            process = subprocess.Popen(
                _command(kind, listener.fileno()),
                env={**os.environ, **(env or {}), _APP: app, _JOURNAL: str(write_end)},
                pass_fds=(listener.fileno(), write_end),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        os.close(write_end)
        server = Server(kind, address, process, Journal(read_end), log)
        try:
            server.expect("serving")
            yield server
        finally:
            _stop(process)
    finally:
        os.close(read_end)


def _listen(folder: Path | None) -> tuple[socket.socket, Any]:
    listener = socket.socket(socket.AF_UNIX if folder else socket.AF_INET)
    listener.bind(str(folder / "socket") if folder else ("127.0.0.1", 0))
    listener.listen(256)
    return listener, listener.getsockname()


def _command(kind: str, fd: int) -> list[str]:
    name, _, worker = kind.partition("-")
    if name != "gunicorn":
        return [sys.executable, __file__, kind, str(fd)]
    threads = ["--threads", str(THREADS)] if worker == "gthread" else []
    return [
        *(sys.executable, "-m", "gunicorn", "servers:app_from_environment()"),
        *("--pythonpath", str(_TESTS), "--bind", f"fd://{fd}", "--workers", "1", "-k", worker, *threads),
        *("--keep-alive", "5", "--graceful-timeout", "5", "--log-level", "info"),
        *_without_control_socket(),
    ]


def _without_control_socket() -> list[str]:
    """Keep newer gunicorns from writing a socket of their own into the home directory."""
    from gunicorn.config import KNOWN_SETTINGS

    flag = "--no-control-socket"
    return [flag] if any(flag in (setting.cli or ()) for setting in KNOWN_SETTINGS) else []


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(PATIENCE)
        raise AssertionError("the server did not end within 10 s after SIGTERM") from None


# --- inside the server's process ----------------------------------------------------------------------------


def app_from_environment() -> Any:
    """Build the app that the test named, with its journal."""
    file, _, factory = os.environ[_APP].partition(":")
    path = _TESTS / file
    sys.path[:0] = [str(path.parent), str(_TESTS)]
    app = getattr(importlib.import_module(path.stem), factory)(say)
    say("serving", pid=os.getpid())
    return app


def say(what: str, **facts: Any) -> None:
    """Write an entry into the journal; one write, so that threads do not mix their lines."""
    os.write(int(os.environ[_JOURNAL]), json.dumps({"what": what, **facts}).encode() + b"\n")


def query(environ: dict[str, Any]) -> dict[str, str]:
    """Return the parameters of a request."""
    return dict(parse_qsl(environ.get("QUERY_STRING", "")))


def census() -> dict[str, Any]:
    """Return what this process holds: its threads by name, and the number of its descriptors."""
    import threading

    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "fds": len(os.listdir("/proc/self/fd")) - 1,  # noqa: PTH208 - a number is all that is needed
    }


def _run_waitress(app: Any, listener: socket.socket) -> None:
    from waitress import create_server

    lookahead = int(os.environ.get("LOOKAHEAD", "0"))
    create_server(app, sockets=[listener], threads=THREADS, channel_request_lookahead=lookahead).run()


def _run_werkzeug(app: Any, listener: socket.socket) -> None:
    from werkzeug.serving import make_server

    host, port = listener.getsockname()
    make_server(host, port, app, threaded=True, fd=listener.fileno()).serve_forever()


def _run_wsgiref(app: Any, listener: socket.socket) -> None:
    import socketserver
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

    class ThreadedServer(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

    server = ThreadedServer(listener.getsockname(), WSGIRequestHandler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_name, server.server_port = listener.getsockname()
    server.setup_environ()
    server.set_app(app)
    server.serve_forever()


def _main(kind: str, fd: str) -> None:
    # Through SystemExit, so that what runs at exit (coverage, for one) runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    run = {"waitress": _run_waitress, "werkzeug": _run_werkzeug, "wsgiref": _run_wsgiref}[kind]
    # The apps import `servers`, which is this very module under another name.
    sys.modules["servers"] = sys.modules["__main__"]
    run(app_from_environment(), socket.socket(fileno=int(fd)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
