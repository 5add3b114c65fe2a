"""urllib3's pools: a connection is bound to the current token at checkout, and unbound before it is idle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from urllib3 import connection, connectionpool
from urllib3.util import Retry

from tokenscope._core._typing import override
from tokenscope._core.current import current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._binding import decide
from tokenscope.integrations._urllib3_connection import (
    GuardedConnection,
    GuardedHTTPConnection,
    GuardedHTTPSConnection,
)
from tokenscope.integrations._urllib3_hooks import refuse_http2
from tokenscope.integrations._urllib3_queue import SlotQueue
from tokenscope.integrations._urllib3_retry import cancellable

if TYPE_CHECKING:
    import urllib3

    _Base = connectionpool.HTTPConnectionPool
else:
    _Base = object

__all__ = [
    "GuardedHTTPConnectionPool",
    "GuardedHTTPSConnectionPool",
    "GuardedPool",
    "guard_manager",
    "guarded_classes",
    "is_guarded",
]


class GuardedPool(_Base):
    """Mixed into a urllib3 pool class, in front of it. Its ``ConnectionCls`` is a `GuardedConnection`."""

    QueueCls = SlotQueue

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_http2()
        super().__init__(*args, **kwargs)

    @override
    def urlopen(  # type: ignore[override]
        self,
        method: str,
        url: str,
        body: Any = None,
        headers: Any = None,
        retries: Retry | bool | int | None = None,
        redirect: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As urllib3's, under the current token.

        Raises:
            Cancelled: The token is cancelled. The transport's error, if it came to one, is the ``__cause__``.
        """
        if not isinstance(retries, Retry):
            retries = Retry.from_int(retries, redirect=redirect, default=self.retries)
        token = current_token()
        token.check()
        try:
            return super().urlopen(method, url, body, headers, cancellable(retries), redirect, *args, **kwargs)
        except Exception as error:
            # Also the wait for a slot ends here: as EmptyPoolError, for which alone urllib3 puts no slot
            # back.
            decide(token, error)
            raise

    @override
    def _get_conn(self, timeout: float | None = None) -> Any:
        conn = super()._get_conn(timeout)
        if isinstance(conn, GuardedConnection):
            conn.bind()
        return conn

    @override
    def _put_conn(self, conn: Any) -> None:
        # Unbind before anybody else can take it: a cancel that comes now must not hit the next request.
        if isinstance(conn, GuardedConnection) and not conn.unbind():
            conn.close()
        super()._put_conn(conn)


class GuardedHTTPConnectionPool(GuardedPool, connectionpool.HTTPConnectionPool):
    """`urllib3.HTTPConnectionPool`, cancellable."""

    ConnectionCls = GuardedHTTPConnection


class GuardedHTTPSConnectionPool(GuardedPool, connectionpool.HTTPSConnectionPool):
    """`urllib3.HTTPSConnectionPool`, cancellable."""

    ConnectionCls = GuardedHTTPSConnection


_guarded: dict[type[Any], type[Any]] = {
    connectionpool.HTTPConnectionPool: GuardedHTTPConnectionPool,
    connectionpool.HTTPSConnectionPool: GuardedHTTPSConnectionPool,
}


def is_guarded(manager: urllib3.PoolManager) -> bool:
    """Whether the manager's pools are cancellable."""
    return all(issubclass(pool, GuardedPool) for pool in manager.pool_classes_by_scheme.values())


def guard_manager(manager: urllib3.PoolManager) -> None:
    """Make every pool that this manager opens from now on cancellable; idle connections are closed.

    Raises:
        TokenScopeError: The manager's connections connect in a way of their own (SOCKS), or urllib3's HTTP/2
            mode is on. Nothing was changed.
    """
    manager.pool_classes_by_scheme = guarded_classes(manager)
    manager.clear()


def guarded_classes(manager: urllib3.PoolManager) -> dict[str, type[Any]]:
    """The manager's classes of pools, each with the guards on top.

    Raises:
        TokenScopeError: As `guard_manager`.
    """
    refuse_http2()
    return {scheme: _guarded_class(pool) for scheme, pool in manager.pool_classes_by_scheme.items()}


def _guarded_class(pool: type[Any]) -> type[Any]:
    if issubclass(pool, GuardedPool):
        return pool
    if pool not in _guarded:
        _guarded[pool] = type(
            f"Guarded{pool.__name__}", (GuardedPool, pool), {"ConnectionCls": _guarded_connection(pool)}
        )
    return _guarded[pool]


def _guarded_connection(pool: type[Any]) -> type[Any]:
    plain = getattr(pool, "ConnectionCls", None)
    if plain is None:
        raise TokenScopeError(f"{pool.__name__} does not say what it connects with: it is no pool of urllib3's own")
    if plain._new_conn is not connection.HTTPConnection._new_conn:  # noqa: SLF001 - one of the hooks
        raise TokenScopeError(
            f"{pool.__name__} connects in a way of its own ({plain.__name__}), where a cancel could not"
            " reach it; SOCKS proxies are not supported yet"
        )
    return type(f"Guarded{plain.__name__}", (GuardedConnection, plain), {})
