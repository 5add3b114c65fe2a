"""The server: one thread that accepts, one for each connection, and a record of what happened."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import ssl

    from peers.certs import Authority

# What the kernel tells about a peer that is gone without our reading a byte: FIN, both directions closed,
# RST.
_HANG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR
_JOIN = 5.0

Script = Callable[["Exchange"], None]


class Gone(Exception):
    """The client has closed the connection, or the peer is being stopped."""


@dataclass
class Request:
    """The head of a request, and its body if it was read."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Peer:
    """A server that plays ``script`` on every connection until the client goes. A context manager.

    Args:
        script: What to do with a request: read it, answer it or hang.
        tls: Whose certificates to use; None is plain TCP.
        scheme: What `url` begins with, where that is not what ``tls`` says (a peer that never answers a
            handshake).

    Attributes:
        requests: How many request heads have arrived, on all connections.
        targets: Their targets, in order.
        connections: How many connections were accepted.
        reached: Set when a script has begun to hang.
        closed: Set when a client has closed a connection on which a script hung, or dripped.
        errors: What went wrong in scripts, other than a client that went away.
    """

    script: Script
    tls: Authority | None = None
    scheme: str = ""
    requests: int = 0
    targets: list[str] = field(default_factory=list)
    connections: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.stopping = threading.Event()

    # --- for tests ------------------------------------------------------------------------------------------

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        """Return the URL of a path on this server."""
        scheme = self.scheme or ("https" if self.tls else "http")
        return f"{scheme}://{host}:{self.port}{path}"

    def __enter__(self) -> Self:
        self.listener = self.listen()
        self.bell, self._ringer = socket.socketpair()
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.errors:
            raise ExceptionGroup("scripts failed", [e for e in self.errors if isinstance(e, Exception)])

    def stop(self) -> None:
        """End all scripts and close everything."""
        self.stopping.set()
        self._ringer.close()  # readable at the other end, for everyone who polls it
        with self._lock:
            for sock in self._open:
                # Through the base class: SSLSocket's own would drop the TLS layer under the script.
                _quietly(socket.socket.shutdown, sock, socket.SHUT_RDWR)
        for thread in tuple(self._threads):
            thread.join(_JOIN)
            assert not thread.is_alive(), f"a script does not end: {thread.name}"
        self.listener.close()
        self.bell.close()

    # --- inside ---------------------------------------------------------------------------------------------

    def listen(self) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = listener.getsockname()[1]
        return listener

    def _spawn(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"peer-{self.port}", daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while wait_for(self.listener, select.POLLIN, self.bell):
            sock, _address = self.listener.accept()
            self.connections += 1
            self._spawn(lambda sock=sock: self._serve(sock))

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._track(sock)
            if self.tls:
                sock = self._handshake(sock)
            self._play(Exchange(self, sock))
        except (OSError, Gone):
            pass  # the client went away: that is what these tests are about
        except BaseException as error:
            self.errors.append(error)
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    def _play(self, exchange: Exchange) -> None:
        while not self.stopping.is_set():
            self.script(exchange)

    def _handshake(self, sock: socket.socket) -> ssl.SSLSocket:
        assert self.tls is not None
        wrapped = self.tls.server_context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        try:
            self._track(wrapped)
            wrapped.do_handshake()
        except BaseException:
            wrapped.close()  # wrapping took the descriptor over; the caller has an empty shell
            raise
        return wrapped

    def _track(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.add(sock)
            if self.stopping.is_set():
                raise Gone


class Exchange:
    """One connection, as its script sees it.

    Attributes:
        peer: The server.
        sock: The socket, after the TLS handshake if there was one.
    """

    def __init__(self, peer: Peer, sock: socket.socket) -> None:
        self.peer = peer
        self.sock = sock
        self._buffer = b""

    def read_request(self, *, body: bool = True) -> Request:
        """Read the next request and count it; its body too (by length or chunks), unless told otherwise.

        Raises:
            Gone: The client closed the connection instead.
        """
        lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        method, target, _version = lines[0].split(" ")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        with self.peer._lock:
            self.peer.requests += 1
            self.peer.targets.append(target)
        request = Request(method, target, headers)
        if body:
            request.body = self.read_body(headers)
        return request

    def read_body(self, headers: dict[str, str]) -> bytes:
        """Read the body of a request whose head was read, by length or chunks."""
        if headers.get("transfer-encoding") != "chunked":
            return self._exactly(int(headers.get("content-length", 0)))
        chunks = []
        while size := int(self._until(b"\r\n"), 16):
            chunks.append(self._exactly(size + 2)[:-2])
        self._exactly(2)
        return b"".join(chunks)

    def peek_line(self) -> str:
        """Return method and target of the next request, as ``"GET /path"``; it stays to be read.

        Raises:
            Gone: The client closed the connection instead.
        """
        while b"\r\n" not in self._buffer:
            self._more()
        return self._buffer.partition(b"\r\n")[0].rpartition(b" ")[0].decode("latin-1")

    def peek_target(self) -> str:
        """Return the target of the next request, which stays to be read.

        Raises:
            Gone: The client closed the connection instead.
        """
        return self.peek_line().partition(" ")[2]

    def read_all(self) -> None:
        """Read and drop what comes, up to the end.

        Raises:
            Gone: The end has come.
        """
        while True:
            self._buffer = b""
            self._more()

    def send(self, *parts: bytes) -> None:
        """Send, all at once."""
        self.sock.sendall(b"".join(parts))

    def hang(self) -> None:
        """Do nothing, until the client closes the connection (or the test is over).

        Raises:
            Gone: Always; ``peer.closed`` is set if it was the client.
        """
        self.peer.reached.set()
        self.pause(None)
        raise AssertionError("a hang ends by the client or by stop()")

    def pause(self, seconds: float | None) -> None:
        """Do nothing for so long.

        Raises:
            Gone: The client closed the connection meanwhile; ``peer.closed`` is set.
        """
        if wait_for(self.sock, _HANG_UP, self.peer.bell, seconds):
            self.peer.closed.set()
            raise Gone
        if self.peer.stopping.is_set():
            raise Gone

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._more()
        head, _, self._buffer = self._buffer.partition(mark)
        return head

    def _more(self) -> None:
        received = self.sock.recv(65536)
        if not received:
            raise Gone
        self._buffer += received

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken


def wait_for(sock: socket.socket, events: int, bell: socket.socket, seconds: float | None = None) -> bool:
    """Wait for events on a socket; False if the bell rang first or the time is up."""
    poll = select.poll()
    poll.register(sock, events)
    poll.register(bell, select.POLLIN)
    ready = dict(poll.poll(None if seconds is None else seconds * 1000))
    return sock.fileno() in ready and bell.fileno() not in ready


def _quietly(call: Callable[..., object], *args: object) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        call(*args)
