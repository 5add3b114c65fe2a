"""What a peer does with a request: one script for each phase in which a client can be blocked.

A plain function is a script; one that returns a `Script` takes arguments first.
"""

from __future__ import annotations

import gzip
import select
import socket
from typing import TYPE_CHECKING

from peers.server import Gone

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peers.server import Exchange, Script

OK = b"HTTP/1.1 200 OK\r\n"

# For each way to delimit a body: the headers, and a first part after which the peer falls silent.
BODIES: dict[str, tuple[bytes, bytes]] = {
    "content-length": (b"Content-Length: 1000\r\n", b"x" * 100),
    "chunked": (b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n"),
    "gzip": (b"Content-Encoding: gzip\r\nContent-Length: 1000\r\n", gzip.compress(b"y" * 5000)[:30]),
    "until-close": (b"Connection: close\r\n", b"part of something longer"),
    "close-length": (b"Connection: close\r\nContent-Length: 1000\r\n", b"z" * 100),
    "sse": (
        b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n",
        b"e\r\ndata: token 1\n\r\n",
    ),
}


# --- scripts that answer ------------------------------------------------------------------------------------


def answers(body: bytes = b"hello", *, status: str = "200 OK", headers: Mapping[str, str] | None = None) -> Script:
    """Answer the request, and keep the connection."""
    head = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body

    def script(exchange: Exchange) -> None:
        exchange.read_request()
        exchange.send(answer)

    return script


def redirects_to(location: str) -> Script:
    """Send every client elsewhere."""
    return answers(b"", status="302 Found", headers={"Location": location})


def by_path(scripts: Mapping[str, Script], otherwise: Script) -> Script:
    """Play, for each request, the script that stands beside its path."""

    def script(exchange: Exchange) -> None:
        scripts.get(exchange.peek_target(), otherwise)(exchange)

    return script


# --- scripts that hang --------------------------------------------------------------------------------------


def hangs_before_headers(exchange: Exchange) -> None:
    """Read the request, say nothing."""
    exchange.read_request()
    exchange.hang()


def hangs_in_headers(exchange: Exchange) -> None:
    """Send a status line and a header; the client takes an end here for a complete, empty answer."""
    exchange.read_request()
    exchange.send(OK, b"X-Half: yes\r\n")
    exchange.hang()


def hangs_in_body(kind: str) -> Script:
    """Send the head and the first part of a body; the kinds are those of `BODIES`."""
    headers, part = BODIES[kind]

    def script(exchange: Exchange) -> None:
        exchange.read_request()
        exchange.send(OK, headers, b"\r\n", part)
        exchange.hang()

    return script


def drips(exchange: Exchange) -> None:
    """Send an event every two milliseconds, for ever: the client is never blocked for long."""
    exchange.read_request()
    exchange.send(OK, BODIES["sse"][0], b"\r\n")
    exchange.peer.reached.set()
    while True:
        exchange.pause(0.002)
        exchange.send(BODIES["sse"][1])


def never_reads_body(exchange: Exchange) -> None:
    """Read the head of an upload and not a byte more."""
    exchange.read_request(body=False)
    exchange.hang()


def reads_body_late(exchange: Exchange) -> None:
    """As `never_reads_body`, but after two seconds read on until the end.

    A reset that meets a full receive window is lost once in a thousand times (the kernel drops it as out of
    the window); the sender is gone by then, so only a peer that reads again learns of it.
    """
    exchange.read_request(body=False)
    exchange.peer.reached.set()
    exchange.pause(2.0)
    try:
        exchange.read_all()
    finally:
        exchange.peer.closed.set()


def redirect_body_hangs(exchange: Exchange) -> None:
    """Send a redirect whose own body never ends."""
    exchange.read_request()
    exchange.send(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 1000\r\n\r\n", b"moved")
    exchange.hang()


def never_answers(exchange: Exchange) -> None:
    """Say nothing from the first byte on: for a TLS client, a handshake that hangs."""
    exchange.hang()


# --- proxies ------------------------------------------------------------------------------------------------


def hangs_after_connect(exchange: Exchange) -> None:
    """Take a CONNECT, do not answer it."""
    exchange.read_request()
    exchange.hang()


def hangs_in_connect_answer(exchange: Exchange) -> None:
    """Answer a CONNECT by half; the client takes an end here for a complete answer."""
    exchange.read_request()
    exchange.send(b"HTTP/1.1 200 Connection established\r\nX-Half: yes\r\n")
    exchange.hang()


def tunnels(exchange: Exchange) -> None:
    """Connect to where CONNECT says and pass bytes both ways."""
    host, _, port = exchange.read_request().target.rpartition(":")
    with socket.create_connection((host, int(port)), 5) as far:
        exchange.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        _relay(exchange, far)


def _relay(exchange: Exchange, far: socket.socket) -> None:
    other = {exchange.sock.fileno(): far, far.fileno(): exchange.sock}
    poll = select.poll()
    for sock in (exchange.sock, far, exchange.peer.bell):
        poll.register(sock, select.POLLIN)
    while True:
        for number, _events in poll.poll():
            if number == exchange.peer.bell.fileno():
                raise Gone
            data = (far if other[number] is exchange.sock else exchange.sock).recv(65536)
            if not data:
                exchange.peer.closed.set()
                raise Gone
            other[number].sendall(data)
