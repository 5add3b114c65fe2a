"""Cancellable psycopg 3: `connect` and `Connection` as drop-ins, server-side cursors, COPY and `stream` included.

guarded:      connecting, and whatever `psycopg.Connection.wait` waits for: each statement, fetch, COPY, pipeline
interrupted:  PostgreSQL is asked to cancel, on a second connection, until the call ends; then the socket is shut down
not:          name look-up; COMMIT (on purpose), by `commit`, a transaction block or the statement; `notifies` ends
    within a second, and loses its connection; connecting ends within 0.1 s; pools: waiting for a connection
versions:     psycopg >=3.2.2, on libpq >=17 (the binary package has it; an older one stops without a time limit)
compat:       psycopg-3.2.2, psycopg-latest
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from tokenscope._core._typing import override
from tokenscope._core.current import current_token, standing_back, uninterruptible
from tokenscope.integrations._missing import needs
from tokenscope.integrations._sql import Driver, Guard, TwoPhaseEnds, in_front_of, shut_down

with needs("psycopg", extra="psycopg"):
    import psycopg
    from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
    from psycopg.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Self

__all__ = ["Connection", "Cursor", "ServerCursor", "connect"]

# Seconds for one request to cancel: its connection may hang like any other.
_CANCEL_PATIENCE = 5.0


class Cursor(psycopg.Cursor[Row]):
    """`psycopg.Cursor` in which COMMIT and ROLLBACK are treated as the methods of the connection are."""

    @override
    def execute(self, query: Any, *args: Any, **options: Any) -> Self:
        """As psycopg's."""
        guard: Guard = self.connection._guard  # type: ignore[attr-defined]  # noqa: SLF001  # one machine in two classes
        execute = super().execute  # which comes through `Connection.wait`
        guard.ending(query, execute, execute)(query, *args, **options)
        return self


class ServerCursor(psycopg.ServerCursor[Row]):
    """`psycopg.ServerCursor` that can be closed whether or not the current token is cancelled."""

    @override
    def close(self) -> None:
        """As psycopg's."""
        guard: Guard = self.connection._guard  # type: ignore[attr-defined]  # noqa: SLF001
        guard.rollback(super().close)


class Connection(TwoPhaseEnds, psycopg.Connection[Row]):
    """`psycopg.Connection` whose calls end with the current token.

    A blocked call raises `Cancelled`; psycopg's error is its ``__cause__``. By then PostgreSQL has stopped, and the
    transaction has been rolled back (by its block, if it has one), or the connection is closed, if it is not certain
    what state it is in. A commit is refused if the token is cancelled, and is not interrupted once it has begun;
    a rollback always works.

    Thread-safe as far as psycopg's is, but a cancel takes the transaction from all who share it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = Guard(self, _DRIVER)
        self._blocks = 0  # transaction blocks that are open

    @property
    def cursor_factory(self) -> Any:
        """As psycopg's; cursor classes of others learn to treat COMMIT as a commit."""
        return self._cursor_factory

    @cursor_factory.setter
    def cursor_factory(self, factory: Any) -> None:
        self._cursor_factory = _put_in_front(factory, Cursor)

    @property
    def server_cursor_factory(self) -> Any:
        """As psycopg's; cursor classes of others can be closed under a cancelled token."""
        return self._server_cursor_factory

    @server_cursor_factory.setter
    def server_cursor_factory(self, factory: Any) -> None:
        self._server_cursor_factory = _put_in_front(factory, ServerCursor)

    @classmethod
    @override
    def _connect_gen(cls, *args: Any, **options: Any) -> Generator[Any, Any, Self]:
        """Connect, step by step; psycopg comes back at least every tenth of a second."""
        token = current_token()
        steps = super()._connect_gen(*args, **options)
        answer: Any = None
        while True:
            if not standing_back():
                token.check()
            try:
                step = steps.send(answer)
            except StopIteration as end:
                connection: Self = end.value
                return connection
            answer = yield step

    @override
    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """As psycopg's: all that blocks comes through here."""
        return self._guard.call(super().wait, gen, *args, **options)

    # They send nothing: whoever puts things in order after a cancel needs them.

    @override
    def set_autocommit(self, value: bool) -> None:
        """As psycopg's, whether or not the current token is cancelled."""
        self._guard.rollback(super().set_autocommit, value)

    @override
    def set_isolation_level(self, value: Any) -> None:
        """As psycopg's, whether or not the current token is cancelled."""
        self._guard.rollback(super().set_isolation_level, value)

    @override
    def set_read_only(self, value: bool | None) -> None:
        """As psycopg's, whether or not the current token is cancelled."""
        self._guard.rollback(super().set_read_only, value)

    @override
    def set_deferrable(self, value: bool | None) -> None:
        """As psycopg's, whether or not the current token is cancelled."""
        self._guard.rollback(super().set_deferrable, value)

    @override
    @contextlib.contextmanager
    def transaction(self, *args: Any, **options: Any) -> Iterator[psycopg.Transaction]:
        """As psycopg's; its end is like `commit` or `rollback`."""
        block = super().transaction(*args, **options)
        transaction = block.__enter__()
        self._blocks += 1
        try:
            yield transaction
            if not standing_back():
                current_token().check()
        except BaseException as error:
            with uninterruptible():
                if block.__exit__(type(error), error, error.__traceback__):
                    return
            raise
        finally:
            self._blocks -= 1
        with uninterruptible():
            block.__exit__(None, None, None)


def _put_in_front(factory: Any, ours: type) -> Any:
    """What is no class is left alone."""
    if not isinstance(factory, type):
        return factory
    return ours if issubclass(ours, factory) else in_front_of(factory, ours)


connect: Callable[..., Connection[Any]] = Connection.connect


def _stop(connection: Connection[Any]) -> None:
    connection.cancel_safe(timeout=_CANCEL_PATIENCE)


def _hang_up(connection: Connection[Any]) -> None:
    shut_down(connection.fileno())


def _close(connection: Connection[Any]) -> None:
    connection.pgconn.finish()  # psycopg's `close` may give it back to its pool


def _midway(connection: Connection[Any]) -> bool:
    return not connection.closed and connection.pgconn.transaction_status == TransactionStatus.ACTIVE


def _is_certain(connection: Connection[Any], _error: Exception | None) -> bool:
    connected = connection.pgconn
    return (
        connected.status == ConnStatus.OK and connected.transaction_status in _KNOWN and not connected.pipeline_status
    )


def _roll_back(connection: Connection[Any]) -> None:
    """Roll back below psycopg's methods: whoever waited holds its lock. A transaction block rolls back itself."""
    if connection.pgconn.transaction_status == TransactionStatus.IDLE or connection._blocks:  # noqa: SLF001
        return
    if connection.pgconn.exec_(b"ROLLBACK").status != ExecStatus.COMMAND_OK:
        raise psycopg.OperationalError("PostgreSQL would not roll back")


_KNOWN = {TransactionStatus.IDLE, TransactionStatus.INTRANS, TransactionStatus.INERROR}
_DRIVER = Driver(
    stop=_stop,
    is_certain=_is_certain,
    roll_back=_roll_back,
    close=_close,
    hang_up=_hang_up,
    midway=_midway,
)
