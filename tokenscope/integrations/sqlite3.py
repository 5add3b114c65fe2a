"""Cancellable sqlite3: `connect`, `Connection` and `Cursor` as drop-ins for those of the standard library.

guarded:      execute, executemany, executescript, each fetch, and waiting for a lock that somebody else holds
interrupted:  ``Connection.interrupt`` by a worker, again until the call ends; the wait for a lock is cut into slices
not:          ``backup``, ``load_extension``, a function of yours that SQLite calls; COMMIT (on purpose); the wait
    for a lock after ``PRAGMA busy_timeout``
versions:     the sqlite3 of Python >=3.11
compat:       tests/integrations/test_sqlite3.py
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import sys
import time
import weakref
from typing import TYPE_CHECKING, Any

from tokenscope._core._typing import override
from tokenscope._core.current import current_token
from tokenscope.integrations._sql import END, Driver, Guard, in_front_of, next_or_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from tokenscope._core.token import CancellationToken

__all__ = ["Connection", "Cursor", "connect"]

# Seconds that SQLite itself may wait for a lock: how late a cancel is noticed there. Each slice costs one more
# try of the statement.
_SLICE = 0.005


def connect(database: Any, timeout: float = 5.0, **options: Any) -> Connection:
    """As `sqlite3.connect`: a connection whose calls end with the current token.

    Args:
        database: As there.
        timeout: Seconds to wait for a lock that somebody else holds, before `sqlite3.OperationalError`.
        **options: As there; a ``factory`` must be a subclass of this module's `Connection`.

    Raises:
        TypeError: ``timeout`` is no number, or ``factory`` no such class.
    """
    factory = options.pop("factory", Connection)
    if not (isinstance(factory, type) and issubclass(factory, Connection)):
        raise TypeError(f"factory must be a subclass of {__name__}.Connection, not {factory!r}")
    return sqlite3.connect(database, timeout=timeout, factory=factory, **options)


class Connection(sqlite3.Connection):
    """`sqlite3.Connection` whose calls end with the current token.

    A blocked call raises `Cancelled`; the error of SQLite is its ``__cause__``. Then the transaction has been rolled
    back, all of it, and the connection is as good as before; what other cursors had read half can only be asked anew,
    and open blobs are closed. ``commit`` is refused if the token is cancelled, and is
    not interrupted once it has begun; ``rollback`` always works. Outside of any scope nothing is interrupted.

    SQLite interrupts whatever a connection does: let no two requests share one at the same time. As thread-safe as
    `sqlite3.Connection`.
    """

    def __init__(self, database: Any, timeout: float = 5.0, **options: Any) -> None:
        if not isinstance(timeout, int | float):
            raise TypeError(f"timeout must be a number of seconds, not {timeout!r}")
        super().__init__(database, timeout=min(timeout, _SLICE), **options)
        self._patience = timeout
        self._guard = Guard(self, _DRIVER)
        self._cursors: weakref.WeakSet[Cursor] = weakref.WeakSet()
        self._blobs: weakref.WeakSet[sqlite3.Blob] = weakref.WeakSet()

    @override
    def cursor(self, factory: Any = None) -> Any:
        """As the standard library's; cursor classes of others are made cancellable.

        Raises:
            TypeError: ``factory`` is no cursor class.
        """
        return super().cursor(_cancellable(factory or Cursor))

    @override
    def execute(self, sql: str, *parameters: Any) -> Any:
        """As `Cursor.execute`, with a new cursor."""
        return self.cursor().execute(sql, *parameters)

    @override
    def executemany(self, sql: str, parameters: Any) -> Any:
        """As `Cursor.executemany`, with a new cursor."""
        return self.cursor().executemany(sql, parameters)

    @override
    def executescript(self, sql_script: str) -> Any:
        """As `Cursor.executescript`, with a new cursor."""
        return self.cursor().executescript(sql_script)

    @override
    def blobopen(self, *args: Any, **options: Any) -> sqlite3.Blob:
        """As the standard library's."""
        blob: sqlite3.Blob = self._guard.call(self._waiting_for_locks, super().blobopen, *args, **options)
        self._blobs.add(blob)
        return blob

    @override
    def commit(self) -> None:
        """Commit, unless the current token is cancelled.

        Raises:
            Cancelled: It is; nothing was committed.
        """
        self._guard.commit(self._waiting_for_locks, super().commit)

    @override
    def rollback(self) -> None:
        """Roll back, whether or not the current token is cancelled."""
        self._guard.rollback(super().rollback)

    # Both of these commit, too: Django leaves `atomic` blocks so.

    @property
    def isolation_level(self) -> Any:
        """As the standard library's; in a transaction, setting it to None is a commit."""
        return super().isolation_level

    @isolation_level.setter
    def isolation_level(self, level: Any) -> None:
        self._set("isolation_level", level, commits=level is None)

    if sys.version_info >= (3, 12):

        @property
        def autocommit(self) -> Any:
            """As the standard library's; in a transaction, setting it to True is a commit."""
            return super().autocommit

        @autocommit.setter
        def autocommit(self, mode: Any) -> None:
            self._set("autocommit", mode, commits=mode is True)

    def _set(self, name: str, value: object, *, commits: bool) -> None:
        attribute = getattr(sqlite3.Connection, name)
        if commits and self.in_transaction:
            self._guard.commit(self._waiting_for_locks, attribute.__set__, self, value)
        else:
            attribute.__set__(self, value)

    @override
    def __enter__(self) -> Self:
        return self

    @override
    def __exit__(  # type: ignore[override]  # the standard library's answers False, always
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The one in C calls neither `commit` nor `rollback` by name.
        if kind is not None:
            self.rollback()
            return
        try:
            self.commit()
        except BaseException:
            self.rollback()
            raise

    def _waiting_for_locks(self, operation: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run a statement, again and again while SQLite says that it has waited for a lock.

        SQLite waits only where waiting makes sense. An error that comes sooner than a slice is long (two
        connections that wait for each other) is final.
        """
        token = current_token()
        end = time.monotonic() + self._patience
        while True:
            began = time.monotonic()
            try:
                return operation(*args, **options)
            except sqlite3.OperationalError as error:
                now = time.monotonic()
                waited = _is_busy(error) and now - began >= _SLICE
                if not waited or now >= end or token.cancelled:
                    raise

    def _end_what_is_half_read(self) -> None:
        """As long as a query is read half, or a blob is open, an interrupt ends all that the connection is asked.

        Source: https://www.sqlite.org/c3ref/interrupt.html
        """
        for cursor in tuple(self._cursors):
            cursor._tear()  # noqa: SLF001  # one machine in two classes
        for blob in tuple(self._blobs):
            blob.close()

    def _run_script(self, run: Callable[[str], object], script: str) -> None:
        """Run what cannot be tried again: SQLite does all of the waiting itself."""
        pragma = self.cursor()
        sqlite3.Cursor.execute(pragma, f"PRAGMA busy_timeout = {self._patience * 1000:.0f}")
        try:
            run(script)
        finally:
            sqlite3.Cursor.execute(pragma, f"PRAGMA busy_timeout = {min(self._patience, _SLICE) * 1000:.0f}")


class Cursor(sqlite3.Cursor):
    """`sqlite3.Cursor` of a `Connection` whose calls end with the current token."""

    connection: Connection

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._guard = connection._guard  # noqa: SLF001  # one machine in two classes
        self._waiting = connection._waiting_for_locks  # noqa: SLF001
        self._was_held_up = False
        self._is_torn = False  # a cancel ended the query; as it described itself until then:
        self._described: Any = None
        connection._cursors.add(self)  # noqa: SLF001  # as above

    @override
    def execute(self, sql: str, *parameters: Any) -> Self:
        """As the standard library's. COMMIT and ROLLBACK are treated as the methods of the connection are."""
        self._was_held_up = self._is_torn = False
        self._guard.statement(sql, self._waiting, super().execute, sql, *parameters)
        return self

    @override
    def executemany(self, sql: str, parameters: Any) -> Self:
        """As the standard library's; ``rowcount`` is -1 if it had to wait for a lock in the middle."""
        self._is_torn = False
        rows = _Rows(parameters, self._guard.token())
        self._guard.call(self._waiting, super().executemany, sql, rows)
        self._was_held_up = rows.were_held_up
        return self

    @override
    def executescript(self, sql_script: str) -> Self:
        """As the standard library's; a cancel may end it between any two of its statements.

        Raises:
            Cancelled: The current token is cancelled. What the script has committed by then stays.
        """
        self._is_torn = False
        self._guard.call(self.connection._run_script, super().executescript, sql_script)  # noqa: SLF001
        return self

    @property
    def description(self) -> Any:
        """As the standard library's."""
        return self._described if self._is_torn else super().description

    @property
    def rowcount(self) -> int:
        """As the standard library's."""
        return -1 if self._was_held_up else super().rowcount

    @override
    def fetchone(self) -> Any:
        """As the standard library's."""
        return self._guard.call(self._fetch, super().fetchone)

    @override
    def fetchmany(self, size: int | None = None) -> list[Any]:
        """As the standard library's."""
        rows: list[Any] = self._guard.call(self._fetch, super().fetchmany, self.arraysize if size is None else size)
        return rows

    @override
    def fetchall(self) -> list[Any]:
        """As the standard library's."""
        rows: list[Any] = self._guard.call(self._fetch, super().fetchall)
        return rows

    @override
    def __next__(self) -> Any:
        row = self._guard.call(self._fetch, next_or_end, super().__next__)
        if row is END:
            raise StopIteration
        return row

    def _fetch(self, fetch: Callable[..., Any], *args: Any) -> Any:
        if self._is_torn:  # SQLite would say that there are no more rows
            raise sqlite3.OperationalError("a cancel ended this query before all of its rows were read")
        return fetch(*args)

    def _tear(self) -> None:
        """End the query, if there is one, and let nobody take what was read of it for the whole."""
        described = super().description
        if described is not None and not self._is_torn:
            self._is_torn = True
            self._described = described
            # First thing it ends the query before. Then it may fail: interrupted itself, as long as another query is
            # read half; the cursor is closed, or in use by a frame above this one.
            with contextlib.suppress(sqlite3.Error):
                super().execute("")


def _cancellable(factory: Any) -> Any:
    """The cursor class with the guard in front.

    Raises:
        TypeError: It is no cursor class.
    """
    if not (isinstance(factory, type) and issubclass(factory, sqlite3.Cursor)):
        raise TypeError(f"factory must be a class of sqlite3 cursors, not {factory!r}")
    return in_front_of(factory, Cursor)


class _Rows:
    """The rows for an `executemany`, which may be begun again at the row that had to wait for a lock.

    Each row is a statement of its own to SQLite, and mostly too short for an interrupt to meet it. So the rows end
    with the token.
    """

    def __init__(self, rows: Iterable[Any], token: CancellationToken) -> None:
        self._rest = iter(rows)
        self._token = token
        self._current: tuple[Any, ...] = ()
        self._done = 0
        self.were_held_up = False

    def __iter__(self) -> Iterator[Any]:
        self.were_held_up = self._done > 0  # begun again: nobody counts any more what came before
        for row in itertools.chain(self._current, self._rest):
            self._current = (row,)
            if self._token.cancelled:
                raise sqlite3.OperationalError("interrupted")  # as SQLite says it
            yield row
            self._done += 1


def _is_busy(error: sqlite3.Error) -> bool:
    """Whether somebody else holds a lock. A snapshot that is out of date stays so: there waiting does not help."""
    code = getattr(error, "sqlite_errorcode", 0)  # absent where the error is of Python's making
    return code & 0xFF == sqlite3.SQLITE_BUSY and code != sqlite3.SQLITE_BUSY_SNAPSHOT


def _is_certain(_connection: Connection, _error: Exception | None) -> bool:
    return True  # the database is in this process


def _roll_back(connection: Connection) -> None:
    if connection.in_transaction:
        if getattr(connection, "autocommit", None) is True:  # from Python 3.12; its `rollback` does nothing then
            connection.execute("ROLLBACK")
        else:
            connection.rollback()


_DRIVER = Driver(
    stop=sqlite3.Connection.interrupt,
    after_stop=Connection._end_what_is_half_read,  # noqa: SLF001  # this file's
    is_certain=_is_certain,
    roll_back=_roll_back,
    close=sqlite3.Connection.close,
)
