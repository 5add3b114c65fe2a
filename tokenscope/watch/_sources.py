"""How each server shows the client's socket: a table.

A row is a name and a look into the environ. Servers differ, and the presence of a key proves nothing, so only
what really is a socket (``S_ISSOCK``) is accepted; everything else means "not here", never a guess.

Nothing is ever read from what is found here: only its number is asked for.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenscope._core._typing import override
from tokenscope._core.errors import TokenScopeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["EXPLICIT", "SOURCES", "Connection", "NotASocket", "Source", "find_connection"]

#: The key for servers that we do not know: a file descriptor, or anything with ``fileno()``.
EXPLICIT = "tokenscope.connection_fd"


class NotASocket(TokenScopeError):
    """What was put into ``environ["tokenscope.connection_fd"]`` is not an open socket."""


@dataclass(frozen=True, slots=True)
class Source:
    """One server's way to show its socket.

    ``look(environ)`` gives a descriptor, something with ``fileno()``, or None.
    """

    name: str
    look: Callable[[Mapping[str, Any]], Any]


class Connection:
    """The client's connection, as the server holds it. Read-only.

    Attributes:
        source: Which row of the table found it.
        fd: The server's own file descriptor. Not ours: neither read, nor closed, nor watched itself.
        family: ``socket.AF_INET``, ``AF_UNIX`` ...
    """

    __slots__ = ("_holder", "family", "fd", "source")

    def __init__(self, source: str, fd: int, family: int, holder: Any) -> None:
        self.source = source
        self.fd = fd
        self.family = family
        self._holder = holder

    @override
    def __repr__(self) -> str:
        return f"<Connection {self.fd} from {self.source}>"

    def duplicate(self) -> int:
        """A file descriptor of our own for the same connection.

        Raises:
            OSError: The server has closed it meanwhile (``EBADF``), or there are no more descriptors.
        """
        copy = os.dup(self.fd)
        if _number_of(self._holder) != self.fd:
            # The server closed its socket between our look and the dup: the number may be a stranger's.
            os.close(copy)
            raise OSError(errno.EBADF, "the server has closed the connection")
        return copy


def _from_waitress(environ: Mapping[str, Any]) -> Any:
    # The documented value is a bound method of the channel; the channel's socket is not documented.
    channel = getattr(environ.get("waitress.client_disconnected"), "__self__", None)
    return getattr(channel, "socket", None)


#: First match wins. ``wsgi.input`` is wsgiref's: there it is the connection's own buffered reader.
SOURCES: tuple[Source, ...] = (
    Source("gunicorn.socket", lambda environ: environ.get("gunicorn.socket")),
    Source("werkzeug.socket", lambda environ: environ.get("werkzeug.socket")),
    Source("waitress.client_disconnected", _from_waitress),
    Source("wsgi.input", lambda environ: environ.get("wsgi.input")),
)


def find_connection(environ: Mapping[str, Any]) -> Connection | None:
    """Find the client's connection in a WSGI environ; None where the server does not show it.

    Call it outermost, before anything replaces ``wsgi.input``.

    Raises:
        NotASocket: ``environ["tokenscope.connection_fd"]`` is there, and is not an open socket.
    """
    if environ.get(EXPLICIT) is not None:
        return _explicit(environ[EXPLICIT])
    for source in SOURCES:
        found = _connection(source.name, source.look(environ))
        if found is not None:
            return found
    return None


def _explicit(holder: Any) -> Connection:
    found = _connection(EXPLICIT, holder)
    if found is None:
        raise NotASocket(f"environ[{EXPLICIT!r}] must be the descriptor of an open socket, not {holder!r}")
    return found


def _connection(source: str, holder: Any) -> Connection | None:
    if holder is None:
        return None
    fd = _number_of(holder)
    if fd < 0:
        return None
    if isinstance(holder, socket.socket):  # nearly always; everything else has to prove it
        return Connection(source, fd, holder.family, holder)
    return Connection(source, fd, _family_of(fd), holder) if _is_socket(fd) else None


def _number_of(holder: Any) -> int:
    """The descriptor behind ``holder``; -1 if it has none (any more)."""
    if isinstance(holder, int):
        return -1 if isinstance(holder, bool) else holder
    try:
        number = holder.fileno()
    except Exception:  # whatever a stand-in for a stream raises, it is no socket
        return -1
    return number if isinstance(number, int) else -1


def _is_socket(fd: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except (OSError, OverflowError):  # no descriptor, or a number that can be none
        return False


def _family_of(fd: int) -> int:
    """The address family of a bare descriptor, which stays as it is."""
    blocking = os.get_blocking(fd)
    probe = socket.socket(fileno=fd)
    try:
        return int(probe.family)
    finally:
        probe.detach()
        if os.get_blocking(fd) != blocking:  # a socket object obeys socket.setdefaulttimeout()
            os.set_blocking(fd, blocking)
