"""Sockets for code that speaks a protocol of its own: made here (`connect`), or made elsewhere (`guarded`)."""

from __future__ import annotations

import os
import socket
import ssl
from typing import TYPE_CHECKING

from tokenscope._core import clock
from tokenscope.net.connect import connect_guarded
from tokenscope.net.listener import GuardedListener
from tokenscope.net.shared import SharedGuard, take_over
from tokenscope.net.stream import GuardedSocket
from tokenscope.sync._line import waiting_token

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import StrPath

    from tokenscope._core.token import CancellationToken

__all__ = ["connect", "guarded"]

_LAST_PORT = 65535


def connect(
    address: tuple[str, int] | StrPath,
    *,
    timeout: float | None = None,
    token: CancellationToken | None = None,
    source_address: tuple[str, int] | None = None,
    socket_options: Iterable[tuple[int, int, int | bytes]] | None = None,
    ssl_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> GuardedSocket:
    """Connect, and return a socket whose blocking calls end with the token that is current where they are made.

    Any number of threads may use the socket, each under its own token. A cancel that cuts a call cuts the connection,
    for all of them: the peer sees its end, and who is not cancelled himself gets a `TaskCancelled`.

    Args:
        address: Host and port, as for ``socket.create_connection``; or the path of a Unix socket.
        timeout: Seconds for each address of the host; becomes the timeout of the socket. None waits.
        token: Ends the connect and all calls too, beside the current token.
        source_address: The local address to come from.
        socket_options: Set before connecting.
        ssl_context: Go on in TLS. The handshake is cancellable as well.
        server_hostname: Whom the server has to be; the host of ``address`` if there is one.

    Raises:
        Cancelled: This thread is, or was meanwhile, cancelled. Nothing is left open.
        TimeoutError: The last address did not answer within ``timeout``.
        OSError: As the socket's own; ``socket.gaierror`` and ``ssl.SSLError`` are such, too.
        TypeError, ValueError: An argument is none of these.
    """
    seconds = clock.validate_timeout(timeout)
    host = _host(address)
    options = _options(socket_options)
    if source_address is not None and not isinstance(source_address, tuple):
        raise TypeError(f"source_address must be (host, port), not {source_address!r}")
    if ssl_context is not None and not isinstance(ssl_context, ssl.SSLContext):
        raise TypeError(f"ssl_context must be an ssl.SSLContext, not {ssl_context!r}")
    if ssl_context is None and server_hostname is not None:
        raise ValueError(f"server_hostname {server_hostname!r} is for TLS and needs an ssl_context")
    sock, guard = connect_guarded(
        address,
        token=waiting_token(token),
        timeout=seconds,
        source_address=source_address,
        socket_options=options,
        explicit=True,
    )
    guard.detach()  # if a cancel was faster, the next call tells
    connection = GuardedSocket(sock, SharedGuard(guard, token))
    if ssl_context is not None:
        try:
            connection.start_tls(ssl_context, server_hostname=server_hostname or host)
        except BaseException:
            connection.close()
            raise
    return connection


def _options(given: Iterable[tuple[int, int, int | bytes]] | None) -> list[tuple[int, int, int | bytes]]:
    """The socket options, each of the three parts that ``setsockopt`` takes.

    Raises:
        TypeError: They are not.
    """
    try:
        options = [(level, name, value) for level, name, value in given or ()]
    except (TypeError, ValueError):
        raise TypeError(f"socket_options must be tuples (level, name, value), not {given!r}") from None
    return options


def _host(address: object) -> str | None:
    """The host of an address; None for a path.

    Raises:
        TypeError: It is neither.
        ValueError: Its port cannot be one.
    """
    match address:
        case (str(host), int(port)) if not isinstance(port, bool):
            if not 0 <= port <= _LAST_PORT:
                raise ValueError(f"the port of address must be 0 to {_LAST_PORT}, not {port!r}")
            return host.strip("[]")
        case str() | os.PathLike():
            return None
    raise TypeError(f"address must be (host, port), or the path of a Unix socket, not {address!r}")


def guarded(sock: socket.socket, *, token: CancellationToken | None = None) -> GuardedSocket | GuardedListener:
    """Wrap a socket that exists: a connected one as `connect` returns it, or a listening one for its ``accept``.

    It takes the socket over: use and close what is returned.

    Args:
        sock: A TCP or Unix stream socket, plain or TLS.
        token: Ends all calls too, beside the current token of each.

    Raises:
        OSError: The socket is neither connected nor listening.
        TypeError: ``sock`` is no ``socket.socket``, or ``token`` no token.
        ValueError: A datagram socket; a listening one that is wrapped in TLS already.
    """
    if not isinstance(sock, socket.socket):
        raise TypeError(f"sock must be a socket.socket, not {sock!r}")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"sock must be a stream socket, not {sock!r}")
    waiting_token(token)  # a bad one is told here, not at the first call
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        if isinstance(sock, ssl.SSLSocket):
            raise ValueError("sock listens in TLS: pass the plain one, and call start_tls() on what accept() returns")
        return GuardedListener(sock, token)
    sock.getpeername()  # raises if it is not connected
    return take_over(sock, token)
