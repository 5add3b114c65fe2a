"""urllib3's connections with a guard: connect, handshake, reads and writes are cancellable."""

from __future__ import annotations

import socket
import sys
from typing import TYPE_CHECKING, Any

from urllib3 import connection, exceptions
from urllib3.util import connection as util_connection

from tokenscope._core._typing import override
from tokenscope._core.errors import Cancelled
from tokenscope.integrations._binding import Binding
from tokenscope.net import Guard, GuardedSocket, connect_guarded
from tokenscope.net.handshake import close_half_made

__all__ = ["GuardedConnection", "GuardedHTTPConnection", "GuardedHTTPSConnection"]

if TYPE_CHECKING:
    _Base = connection.HTTPConnection
else:
    _Base = object


class GuardedConnection(_Base):
    """Mixed into a urllib3 connection class, in front of it.

    A pool binds it to a token at checkout (`bind`) and unbinds it before taking it back. Its guard belongs to
    one socket: http.client closes the connection while a body is still read from the socket's file, which
    keeps the guard alive.
    """

    _binding: Binding | None = None  # whom it works for; None in the pool
    _guard: Guard | None = None  # made with the socket, forgotten in close()

    def bind(self) -> None:
        """Work for the current token from now on. Never raises `Cancelled`: the pool's slot would be lost."""
        self._binding = Binding.here()
        guard = self._guard
        if guard is None:
            return
        if guard.foreign:  # forked: the socket is the parent's too, and so is what it would answer
            self.close()
        else:
            guard.attach(self._binding.token, explicit=self._binding.explicit)

    def unbind(self) -> bool:
        """Work for nobody. False if the connection was cut and has to be closed."""
        self._binding = None
        return self._guard is None or self._guard.detach()

    @override
    def connect(self) -> None:
        """Connect, through a proxy and with a TLS handshake where needed, or raise what the token says."""
        try:
            self._connect()
        except Cancelled:
            self.close()
            raise
        if self._guard is not None:
            self.sock = GuardedSocket(self.sock, self._guard)

    def _connect(self) -> None:
        try:
            super().connect()
        except Exception as error:
            close_half_made(error)
            self._look(error)
            raise
        self._look()  # a CONNECT answer that was cut in half looks complete

    @override
    def send(self, data: Any) -> None:
        """Send a part of the request, or raise what the token says."""
        try:
            super().send(data)
        except Cancelled:
            self.close()  # right away: some callers (requests 2.28) clean up after an `Exception` only
            raise

    @override
    def getresponse(self) -> Any:
        """Wait for the head of the response, or raise what the token says."""
        try:
            return super().getresponse()
        except Cancelled:
            self.close()
            raise

    def _look(self, error: BaseException | None = None) -> None:
        if self._guard is not None:
            self._guard.check(error)

    @override
    def _new_conn(self) -> socket.socket:
        token, explicit = self._binding or Binding.here()
        try:
            sock, self._guard = connect_guarded(
                (self._dns_host, self.port),
                token=token,
                explicit=explicit,
                timeout=_seconds(self.timeout),
                family=util_connection.allowed_gai_family(),
                source_address=self.source_address,
                socket_options=self.socket_options,
            )
        except (OSError, UnicodeError) as error:
            raise _as_urllib3(self, error) from error
        sys.audit("http.client.connect", self, self.host, self.port)
        return sock

    @override
    def close(self) -> None:
        """Close; a body that is still being read keeps the socket and its guard."""
        guard, self._guard = self._guard, None
        sock = getattr(self, "sock", None)
        try:
            super().close()
        finally:
            if guard is not None and not isinstance(sock, GuardedSocket):
                guard.release()  # cut between connect and handshake: nobody else holds it


class GuardedHTTPConnection(GuardedConnection, connection.HTTPConnection):
    """`urllib3.connection.HTTPConnection` with a guard."""


class GuardedHTTPSConnection(GuardedConnection, connection.HTTPSConnection):
    """`urllib3.connection.HTTPSConnection` with a guard."""


def _seconds(timeout: Any) -> float | None:
    """A timeout as a number; urllib3 1.26 hands on a marker for "the default of the socket module"."""
    if timeout is None or isinstance(timeout, int | float):
        return timeout
    return socket.getdefaulttimeout()


def _as_urllib3(conn: Any, error: Exception) -> Exception:
    """The same failure in the words of urllib3's own ``_new_conn``."""
    if isinstance(error, UnicodeError):
        return exceptions.LocationParseError(f"'{conn.host}', label empty or too long")
    if isinstance(error, socket.gaierror) and hasattr(exceptions, "NameResolutionError"):  # since 2.0
        return exceptions.NameResolutionError(conn.host, conn, error)
    if isinstance(error, TimeoutError):
        return exceptions.ConnectTimeoutError(
            conn, f"Connection to {conn.host} timed out. (connect timeout={conn.timeout})"
        )
    return exceptions.NewConnectionError(conn, f"Failed to establish a new connection: {error}")
