"""Cancellable PyMySQL: `connect` and `Connection` as drop-ins, unbuffered cursors included.

guarded:      connecting over TCP, each statement, further results, the rows of unbuffered cursors, ``ping``
interrupted:  KILL QUERY on a second connection, until the call ends; then the socket is shut down
not:          connecting over a Unix socket; COMMIT (on purpose). Behind a proxy that hands out connection numbers
    of its own, KILL QUERY may hit somebody else: do not use it there
versions:     pymysql >=1.1
compat:       pymysql-1.1.0, pymysql-latest
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING, Any

from tokenscope._core import token as tokens
from tokenscope._core._typing import override
from tokenscope._core.current import current_token, standing_back
from tokenscope.integrations._missing import needs
from tokenscope.integrations._sql import Driver, Ends, Guard, shut_down
from tokenscope.net.connect import connect_guarded

with needs("pymysql", extra="pymysql"):
    import pymysql
    from pymysql.constants import CR, ER, SERVER_STATUS

__all__ = ["Connection", "connect"]

# Seconds for each wait of the second connection, which may hang like any other.
_KILL_PATIENCE = 3.0
# What the second connection does otherwise than the first.
_KILLER = {
    "connect_timeout": _KILL_PATIENCE,
    "read_timeout": _KILL_PATIENCE,
    "write_timeout": _KILL_PATIENCE,
    "autocommit": None,
    "cursorclass": pymysql.cursors.Cursor,
    "defer_connect": False,
    "init_command": None,
    "sql_mode": None,
}
_OPTIONS = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1))


if TYPE_CHECKING:
    _Base = pymysql.connections.Connection[Any]  # generic in its annotations only
else:
    _Base = pymysql.connections.Connection


class Connection(Ends, _Base):
    """`pymysql.Connection` whose calls end with the current token.

    A blocked call raises `Cancelled`; PyMySQL's error, if there was one, is its ``__cause__``. By then the server has
    stopped, and the transaction has been rolled back, or the connection is closed, if it is not certain what state
    it is in. (Some functions of the server answer a KILL as if they had ended; that is not believed.) A commit is
    refused if the token is cancelled, and is not interrupted once it has begun; a rollback always works.

    Not thread-safe, as PyMySQL's is not.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self._guard = Guard(self, _DRIVER)
        self._killer = {**{name: value for name, value in options.items() if not name.startswith("ssl")}, **_KILLER}
        super().__init__(*args, **options)

    @override
    def connect(self, sock: Any = None) -> None:
        """As PyMySQL's.

        Raises:
            Cancelled: The current token was cancelled, before or meanwhile. Nothing is left open.
        """
        token = current_token()
        if token is tokens.NEVER or standing_back():
            super().connect(sock)
            return
        token.check()
        if sock is not None or self.unix_socket:
            super().connect(sock)
            return
        self._connect_under(token)

    def _connect_under(self, token: tokens.CancellationToken) -> None:
        """Connect by TCP. The socket has a guard of its own as long as there is nothing to KILL."""
        source = getattr(self, "bind_address", None)
        try:
            sock, hold = connect_guarded(
                (self.host, self.port),
                token=token,
                timeout=self.connect_timeout,
                source_address=None if source is None else (source, 0),
                socket_options=_OPTIONS,
            )
        except OSError as error:
            raise self.OperationalError(
                CR.CR_CONN_HOST_ERROR, f"Can't connect to MySQL server on {self.host!r} ({error})"
            ) from error
        self.host_info = f"socket {self.host}:{self.port}"
        try:
            super().connect(sock)
        except Exception as error:
            tokens.expire_if_due(token)
            tokens.raise_if_cancelled(token, error)
            raise
        finally:
            unhurt = hold.detach()
            hold.release()
        if not unhurt:
            self.close()
            token.check()

    @override
    def query(self, sql: Any, unbuffered: bool = False) -> Any:
        """As PyMySQL's. COMMIT and ROLLBACK are treated as the methods are."""
        return self._guard.statement(sql, super().query, sql, unbuffered)

    @override
    def next_result(self, unbuffered: bool = False) -> Any:
        """As PyMySQL's."""
        return self._guard.call(super().next_result, unbuffered)

    def _read_packet(self, *args: Any) -> Any:
        """As PyMySQL's: it reads the rows of an unbuffered cursor one by one, outside of any other method."""
        read: Any = super()._read_packet
        if _reads_unbuffered(self):
            return self._guard.call(read, *args)
        return read(*args)

    @override
    def ping(self, *args: Any, **options: Any) -> None:
        """As PyMySQL's."""
        self._guard.call(super().ping, *args, **options)

    @override
    def autocommit(self, value: bool) -> None:
        """As PyMySQL's. In a transaction turning it on is a commit."""
        status: int = getattr(self, "server_status", 0)  # none before the first answer
        in_transaction = status & SERVER_STATUS.SERVER_STATUS_IN_TRANS
        run = self._guard.commit if in_transaction else self._guard.rollback
        run(super().autocommit, value)


def connect(**options: Any) -> Connection:
    """As `pymysql.connect`: a connection whose calls end with the current token."""
    return Connection(**options)


def _reads_unbuffered(connection: Any) -> bool:
    result = connection._result  # noqa: SLF001  # PyMySQL has no other name for it
    return result is not None and bool(result.unbuffered_active)


def _stop(connection: Any) -> None:
    options = {**connection._killer, **_encryption(connection)}  # noqa: SLF001  # it knows the way
    with contextlib.closing(pymysql.connect(**options)) as killer:
        killer.cursor().execute(f"KILL QUERY {connection.thread_id():d}")


def _encryption(connection: Any) -> dict[str, Any]:
    """What the second connection needs to be as secret as the first. Loading certificates anew would take 20 ms."""
    if isinstance(connection._sock, ssl.SSLSocket):  # noqa: SLF001  # as above
        return {"ssl": connection.ctx}
    return {"ssl_disabled": True}


def _hang_up(connection: Any) -> None:
    sock = connection._sock  # noqa: SLF001  # as above
    if sock is not None:
        shut_down(sock.fileno())


def _is_certain(_connection: Connection, error: Exception | None) -> bool:
    """Only one answer says that the server has done as it was told.

    Whatever its class: after ``install_as_MySQLdb`` there are two of each.
    """
    return error is not None and error.args[:1] == (ER.QUERY_INTERRUPTED,)


def _close(connection: Any) -> None:
    result = connection._result  # noqa: SLF001  # as above
    if result is not None:
        result.unbuffered_active = result.has_next = False  # or its cursor, when it is closed, would read to the end
    connection._force_close()  # noqa: SLF001  # after `close` the owner's own `close` would be an error


_DRIVER = Driver(
    stop=_stop,
    is_certain=_is_certain,
    roll_back=Connection.rollback,
    close=_close,
    hang_up=_hang_up,
    midway=_reads_unbuffered,
    certain=False,
)
