"""A connect that a cancel can reach in every microsecond.

A blocking ``connect()`` always has a window: shut down before it began, a socket answers ENOTCONN and then
connects all the same, and the cancel is lost. So: a non-blocking ``connect_ex`` first, *then* the guard is
attached, then a poll, then a look at the token.
"""

from __future__ import annotations

import os
import selectors
import socket
from errno import EAGAIN, EINPROGRESS, EWOULDBLOCK
from typing import TYPE_CHECKING, Any

from tokenscope._core import clock
from tokenscope.net.guard import Guard
from tokenscope.net.resolve import Address, resolve

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _typeshed import StrPath

    from tokenscope._core.token import CancellationToken

__all__ = ["connect_guarded"]

# `poll` needs no descriptor of its own (epoll does) and takes any number (select does not).
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
_STARTED = frozenset({0, EINPROGRESS, EWOULDBLOCK})
# Seconds before a Unix listener whose queue is full is asked again; pulled out of the air.
_ASK_AGAIN = 0.01


def connect_guarded(
    address: tuple[str, int] | StrPath,
    *,
    token: CancellationToken,
    timeout: float | None = None,
    family: int = socket.AF_UNSPEC,
    source_address: tuple[str, int] | None = None,
    socket_options: Iterable[tuple[int, int, int | bytes]] | None = None,
    explicit: bool = False,
) -> tuple[socket.socket, Guard]:
    """Connect to the first address of a name that answers.

    Args:
        address: Host (a name, or digits, IPv6 with or without brackets) and port; or the path of a Unix socket.
        token: Ends it. Its remaining time caps the name look-up and all attempts together.
        timeout: Seconds for each address, as in ``socket.create_connection``; becomes the timeout of the
            socket.
        family: As for ``socket.getaddrinfo``.
        source_address: The local address to come from.
        socket_options: Set before connecting.
        explicit: As in `Guard.attach`.

    Returns:
        The connected socket, and its guard, attached to the token: close the one, release the other.

    Raises:
        Cancelled: The token is cancelled, or its deadline passed. Nothing is left open.
        TimeoutError: The last address did not answer within ``timeout``.
        socket.gaierror: The name does not resolve.
        OSError: The last address refused.
    """
    if not isinstance(address, tuple):
        token.check()
        path = (socket.AF_UNIX, socket.SOCK_STREAM, 0, "", os.fspath(address))
        return _attempt(path, token, timeout, None, socket_options, explicit=explicit)
    host, port = address
    failure: OSError | None = None
    for found in resolve(host.strip("[]"), port, token=token, family=family):
        try:
            return _attempt(found, token, timeout, source_address, socket_options, explicit=explicit)
        except OSError as error:
            failure = error
    try:
        raise failure or OSError("getaddrinfo returns an empty list")
    finally:
        failure = None  # break the cycle of exception and frame


def _attempt(
    found: Address,
    token: CancellationToken,
    timeout: float | None,
    source_address: tuple[str, int] | None,
    socket_options: Iterable[tuple[int, int, int | bytes]] | None,
    *,
    explicit: bool,
) -> tuple[socket.socket, Guard]:
    family, kind, protocol, _name, target = found
    sock = socket.socket(family, kind, protocol)
    try:
        for option in socket_options or ():
            sock.setsockopt(*option)
        if source_address:
            sock.bind(source_address)
        sock.setblocking(False)
        _raise_errno(_start(sock, target, token, timeout), _STARTED)
        guard = Guard(sock)
    except BaseException:
        sock.close()
        raise
    try:
        guard.attach(token, explicit=explicit)
        guard.call(_finish, sock, _shorter(timeout, token.remaining()))
        sock.settimeout(timeout)
    except BaseException:
        guard.release()
        sock.close()
        raise
    return sock, guard


def _start(sock: socket.socket, target: Any, token: CancellationToken, timeout: float | None) -> int:
    """Begin to connect. There is no system call that waits for a place in the queue of a Unix listener."""
    end = clock.deadline_after(timeout)
    while (number := sock.connect_ex(target)) == EAGAIN and sock.family == socket.AF_UNIX:
        if end is not None and clock.now() >= end:
            raise TimeoutError("timed out")
        token.sleep(_ASK_AGAIN)
    return number


def _finish(sock: socket.socket, seconds: float | None) -> None:
    """Wait until the connect has ended, well or not. A guard that fires ends it."""
    with _Selector() as selector:
        selector.register(sock, selectors.EVENT_WRITE)
        if not selector.select(seconds):
            raise TimeoutError("timed out")
    _raise_errno(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), frozenset({0}))


def _raise_errno(number: int, fine: frozenset[int]) -> None:
    if number not in fine:
        raise OSError(number, os.strerror(number))


def _shorter(timeout: float | None, remaining: float | None) -> float | None:
    times = [seconds for seconds in (timeout, remaining) if seconds is not None]
    return min(times, default=None)
