"""Cancellable SQLAlchemy: `instrument` for an engine, whatever is built on it (connections, sessions, the ORM).

guarded:      what the driver's own integration guards: each statement, each fetch, pings and connects
interrupted:  as the driver's own integration does it; the connection stays in its pool if it was put in order
not:          waiting for a connection of the pool (until ``pool_timeout``); COMMIT (on purpose); async engines
versions:     sqlalchemy >=2.0, on sqlite3, psycopg, psycopg2 and PyMySQL
compat:       sqlalchemy-2.0.0, sqlalchemy-latest, tests/integrations/test_sqlalchemy.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenscope._core.errors import Cancelled
from tokenscope.integrations._missing import needs
from tokenscope.integrations._sql import Guard, connect_of

with needs("sqlalchemy", extra="sqlalchemy"):
    import sqlalchemy
    from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Dialect, ExceptionContext

__all__ = ["instrument", "uninstrument"]


def instrument(engine: sqlalchemy.Engine) -> None:
    """Make the statements of an engine end with the current token. Idempotent.

    A blocked statement raises `Cancelled`, with the driver's error as its ``__cause__``. By then the server has been
    stopped, and the transaction rolled back. The connection goes back to its pool, unless its state is in doubt or
    savepoints were open: then it is invalidated. A commit is refused if the token is cancelled, and is never cut.

    Call it before the engine connects for the first time: a connection that is there already stays as it is.

    Raises:
        TypeError: It is no `sqlalchemy.Engine` (an async engine is none).
        TokenScopeError: There is no integration for the engine's driver.
        ImportError: The driver is not installed.
    """
    if not isinstance(engine, sqlalchemy.Engine):
        raise TypeError(f"engine must be a sqlalchemy.Engine, not {engine!r}")
    _connect_of(engine.dialect)
    if not event.contains(engine, "do_connect", _connect):
        event.listen(engine, "do_connect", _connect)
        event.listen(engine, "handle_error", _keep_if_in_order)


def uninstrument(engine: sqlalchemy.Engine) -> None:
    """Undo `instrument` for the connections that the engine makes from now on. Idempotent.

    Raises:
        TypeError: It is no `sqlalchemy.Engine`.
    """
    if not isinstance(engine, sqlalchemy.Engine):
        raise TypeError(f"engine must be a sqlalchemy.Engine, not {engine!r}")
    if event.contains(engine, "do_connect", _connect):
        event.remove(engine, "do_connect", _connect)


def _connect(dialect: Dialect, _record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    return _connect_of(dialect)(*arguments, **options)


def _connect_of(dialect: Dialect) -> Callable[..., Any]:
    """The function that connects with a guard.

    Raises:
        TokenScopeError: There is none for this driver.
    """
    driver = "sqlite3" if dialect.driver == "pysqlite" else dialect.driver
    return connect_of(driver, "SQLAlchemy's driver")


def _keep_if_in_order(context: ExceptionContext) -> None:
    """SQLAlchemy invalidates a connection after any ``BaseException``; ours was put in order before it was raised.

    With savepoints it is right: they are gone with the transaction, and rolling back to one would be an error, which
    would hide the cancel.
    """
    connection = context.connection
    if not isinstance(context.original_exception, Cancelled) or connection is None:
        return
    guard = getattr(connection.connection.dbapi_connection, "_guard", None)
    if isinstance(guard, Guard) and not guard.discarded and not connection.in_nested_transaction():
        context.is_disconnect = False
