"""Cancellable psycopg2: `connect` and `Connection` as drop-ins, named (server-side) cursors and COPY included.

guarded:      each statement, the fetches of named cursors, COPY, ``callproc``
interrupted:  PostgreSQL is asked to cancel, on a second connection, until the call ends; then the socket is shut down
not:          connecting (its ``connect_timeout`` ends it); large objects; COMMIT (on purpose); asynchronous
    connections; COPY FROM a file that goes on and on ends within a second, and loses its connection
versions:     psycopg2 >=2.9.9 on Linux
compat:       psycopg2-binary-2.9.9, psycopg2-binary-latest
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from tokenscope._core._typing import override
from tokenscope._core.current import current_token, standing_back
from tokenscope.integrations._missing import needs
from tokenscope.integrations._sql import END, Driver, Guard, TwoPhaseEnds, in_front_of, next_or_end, shut_down

with needs("psycopg2", extra="psycopg2"):
    import psycopg2
    from psycopg2 import _psycopg, extensions

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Connection", "connect"]


def connect(*args: Any, **options: Any) -> Connection:
    """As `psycopg2.connect`: a connection whose calls end with the current token.

    Raises:
        Cancelled: The current token is cancelled. (One that is cancelled while it connects is seen afterwards.)
        TypeError: A ``connection_factory`` that is no subclass of this module's `Connection`.
    """
    factory = options.pop("connection_factory", None) or Connection
    if not (isinstance(factory, type) and issubclass(factory, Connection)):
        raise TypeError(f"connection_factory must be a subclass of {__name__}.Connection, not {factory!r}")
    if not standing_back():
        current_token().check()
    connection: Connection = psycopg2.connect(*args, connection_factory=factory, **options)
    if current_token().cancelled and not standing_back():
        connection.close()
        current_token().check()
    return connection


class Connection(TwoPhaseEnds, extensions.connection):
    """``psycopg2``'s connection, whose calls end with the current token.

    A blocked call raises `Cancelled`; psycopg2's error is its ``__cause__``. By then PostgreSQL has stopped, and the
    transaction has been rolled back, or the connection is closed, if it is not certain what state it is in. A
    commit is refused if the token is cancelled, and is not interrupted once it has begun; a rollback always works.

    Cursor classes of others (``RealDictCursor``) are made cancellable, too.

    As thread-safe as psycopg2's; but while threads share it nothing is stopped before all of them are cancelled.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = Guard(self, _DRIVER)

    @override
    def cursor(  # type: ignore[override]  # three overloads, all of them of this form
        self, name: Any = None, cursor_factory: Any = None, **options: Any
    ) -> Any:
        """As psycopg2's."""
        default: Any = self.cursor_factory  # often None
        factory = cursor_factory or default or extensions.cursor
        return super().cursor(name, cursor_factory=_cancellable(factory), **options)


class _Cursor(extensions.cursor):
    """The guarded half of every cursor class; see `_cancellable`."""

    @property
    def _guard(self) -> Guard:
        guard: Guard = self.connection._guard  # type: ignore[attr-defined]  # noqa: SLF001  # one machine in two classes
        return guard

    @override
    def execute(self, query: Any, vars: Any = None) -> None:  # noqa: A002  # psycopg2's name
        """As psycopg2's. COMMIT and ROLLBACK are treated as the methods of the connection are."""
        self._guard.statement(query, super().execute, query, vars)

    @override
    def executemany(self, query: Any, vars_list: Any) -> None:
        """As psycopg2's."""
        self._guard.call(super().executemany, query, vars_list)

    @override
    def callproc(self, *args: Any, **options: Any) -> Any:
        """As psycopg2's."""
        return self._guard.call(super().callproc, *args, **options)

    @override
    def copy_expert(self, *args: Any, **options: Any) -> None:
        """As psycopg2's."""
        self._guard.call(super().copy_expert, *args, **options)

    @override
    def copy_from(self, *args: Any, **options: Any) -> None:
        """As psycopg2's."""
        self._guard.call(super().copy_from, *args, **options)

    @override
    def copy_to(self, *args: Any, **options: Any) -> None:
        """As psycopg2's."""
        self._guard.call(super().copy_to, *args, **options)

    @override
    def fetchone(self) -> Any:
        """As psycopg2's."""
        return self._fetch(super().fetchone)

    @override
    def fetchmany(self, *args: Any, **options: Any) -> Any:
        """As psycopg2's."""
        return self._fetch(super().fetchmany, *args, **options)

    @override
    def fetchall(self) -> Any:
        """As psycopg2's."""
        return self._fetch(super().fetchall)

    @override
    def scroll(self, *args: Any, **options: Any) -> None:
        """As psycopg2's."""
        self._fetch(super().scroll, *args, **options)

    @override
    def close(self) -> None:
        """As psycopg2's, whether or not the current token is cancelled."""
        if not self._is_gone():
            self._guard.rollback(super().close)

    def _is_gone(self) -> bool:
        """Whether the cursor has gone with its transaction: psycopg2 would send a CLOSE, which would fail."""
        if self.name is None or self.withhold or self.connection.closed:
            return False
        return self.connection.info.transaction_status == extensions.TRANSACTION_STATUS_IDLE

    @override
    def __iter__(self) -> Self:
        return self

    @override
    def __next__(self) -> Any:
        row = self._fetch(next_or_end, super().__next__)
        if row is END:
            raise StopIteration
        return row

    def _fetch(self, operation: Any, *args: Any, **options: Any) -> Any:
        """A named cursor fetches from the server; any other has all its rows already."""
        if self.name is None:
            return operation(*args, **options)
        return self._guard.call(operation, *args, **options)


def _cancellable(factory: Any) -> Any:
    """The cursor class with the guard in front.

    Raises:
        TypeError: It is no cursor class.
    """
    if not (isinstance(factory, type) and issubclass(factory, extensions.cursor)):
        raise TypeError(f"cursor_factory must be a class of psycopg2 cursors, not {factory!r}")
    return in_front_of(factory, _Cursor)


# The libpq that psycopg2 itself uses. psycopg2's own `cancel` holds the interpreter's lock while it waits for the
# server: one that does not answer would stop the whole process. A call through ctypes lets go of it.
_libpq = ctypes.CDLL(_psycopg.__file__)
_libpq.PQgetCancel.argtypes, _libpq.PQgetCancel.restype = [ctypes.c_void_p], ctypes.c_void_p
_libpq.PQcancel.argtypes, _libpq.PQcancel.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int], ctypes.c_int
_libpq.PQfreeCancel.argtypes, _libpq.PQfreeCancel.restype = [ctypes.c_void_p], None


def _stop(connection: Connection) -> None:
    request = _libpq.PQgetCancel(connection.pgconn_ptr)
    complaint = ctypes.create_string_buffer(256)
    try:
        if not _libpq.PQcancel(request, complaint, len(complaint)):
            raise psycopg2.OperationalError(complaint.value.decode(errors="replace"))
    finally:
        _libpq.PQfreeCancel(request)


def _hang_up(connection: Connection) -> None:
    shut_down(connection.fileno())


def _is_certain(connection: Connection, _error: Exception | None) -> bool:
    return not connection.closed and connection.info.transaction_status in _KNOWN


def _roll_back(connection: Connection) -> None:
    if connection.info.transaction_status != extensions.TRANSACTION_STATUS_IDLE:
        connection.rollback()


_KNOWN = {
    extensions.TRANSACTION_STATUS_IDLE,
    extensions.TRANSACTION_STATUS_INTRANS,
    extensions.TRANSACTION_STATUS_INERROR,
}
_DRIVER = Driver(
    stop=_stop,
    is_certain=_is_certain,
    roll_back=_roll_back,
    close=extensions.connection.close,
    hang_up=_hang_up,
)
