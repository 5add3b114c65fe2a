"""Cancellable databases in Django: `instrument` for the ORM, raw cursors, `atomic`, with no change to the settings.

guarded:      what the integration of the driver guards: each statement, the rows of ``iterator()``, connecting
interrupted:  as that does it; ``atomic`` then rolls back, a connection in doubt is closed and opened again on demand
not:          COMMIT (on purpose), ``on_commit`` hooks (they come after it); waiting for a connection of psycopg's
    pool; mysqlclient and Oracle (refused)
versions:     django >=4.2 on sqlite3, psycopg, psycopg2 and PyMySQL (by its ``install_as_MySQLdb``)
compat:       tests/integrations/test_django_db.py
"""

from __future__ import annotations

import importlib
import threading
import weakref
from typing import TYPE_CHECKING, Any

from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._missing import needs
from tokenscope.integrations._sql import Guard, connect_of

with needs("django", extra="django"):
    from django.db import connections  # type: ignore[import-untyped]
    from django.db.backends.signals import connection_created  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["instrument", "uninstrument"]

# Where Django's backends live: all that build on them are covered, too.
_BACKENDS = {
    "sqlite": "django.db.backends.sqlite3.base",
    "postgresql": "django.db.backends.postgresql.base",
    "mysql": "django.db.backends.mysql.base",
}

_lock = threading.Lock()
_originals: dict[ModuleType, Any] = {}  # backend -> its driver; changed under the lock


def instrument(*aliases: str) -> None:
    """Make the queries of Django's databases end with the current token. Idempotent.

    A blocked query raises `Cancelled`; by then the database has been stopped, and the transaction rolled back. Call it
    once, in an ``AppConfig.ready`` or below the settings: a connection that is open already stays as it is.

    Args:
        aliases: Databases of the settings; none means all of them.

    Raises:
        TokenScopeError: There is no integration for the driver of one of them; nothing was changed.
        django.utils.connection.ConnectionDoesNotExist: There is no such database.
    """
    backends = {_backend_of(alias) for alias in aliases or connections}
    with _lock:
        found = {backend: _connect_of(backend) for backend in backends if backend not in _originals}
        for backend, connect in found.items():
            _originals[backend] = backend.Database
            _set_driver(backend, _Driver(backend.Database, connect))
    connection_created.connect(_follow, dispatch_uid=__name__)


def uninstrument() -> None:
    """Undo `instrument` for the connections that are opened from now on. Idempotent."""
    with _lock:
        for backend, driver in _originals.items():
            _set_driver(backend, driver)
        _originals.clear()
    connection_created.disconnect(dispatch_uid=__name__)


class _Driver:
    """What a backend takes for its driver: the driver's module, but for `connect`."""

    def __init__(self, module: Any, connect: Callable[..., Any]) -> None:
        self._module = module
        self.connect = connect

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _backend_of(alias: str) -> ModuleType:
    vendor = connections[alias].vendor
    if vendor not in _BACKENDS:
        raise TokenScopeError(f"tokenscope cannot cancel queries of the database {alias!r}: it is of {vendor}")
    return importlib.import_module(_BACKENDS[vendor])


def _connect_of(backend: ModuleType) -> Callable[..., Any]:
    return connect_of(backend.Database.__name__.partition(".")[0], "Django's driver")


def _set_driver(backend: Any, driver: Any) -> None:
    backend.Database = driver  # `sqlite3` and `mysql` connect by this one ...
    backend.DatabaseWrapper.Database = driver  # ... `postgresql` by this one


def _follow(connection: Any, **_: object) -> None:
    """Have Django notice when a connection of its own is closed below it: it would give it to the next request."""
    guard = getattr(connection.connection, "_guard", None)
    if isinstance(guard, Guard):
        guard.on_discard = _Close(connection)


class _Close:
    """Closes a database in Django's way, which knows of open ``atomic`` blocks. Holds it weakly."""

    def __init__(self, connection: Any) -> None:
        self._connection = weakref.ref(connection)

    def __call__(self) -> None:
        connection = self._connection()
        if connection is not None:
            connection.close()
