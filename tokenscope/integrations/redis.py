"""Cancellable redis-py: `instrument(client)` makes the calls of one client end with the current token.

guarded:      name look-up, connect (TCP, TLS, Unix socket), commands, pipelines, transactions, BLPOP and the like,
    pub/sub, MONITOR, the wait for a connection of a `BlockingConnectionPool`, the pauses between attempts, a `Lock`
interrupted:  the socket is shut down and the connection closed (its pool makes another one); pauses wait on the token
not:          what the server has begun; ``watch_delay`` of `transaction`; OCSP; what sentinels are asked;
    `RedisCluster`, client-side caching and `redis.asyncio` are refused
versions:     redis >=5.0.1,<9; its hooks are checked when this is imported
compat:       redis-5.0.1, redis-latest, tests/integrations/test_redis.py
"""

from __future__ import annotations

import inspect
import queue
from typing import Any

from tokenscope import sync
from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._missing import needs
from tokenscope.integrations._sql import in_front_of

with needs("redis", extra="redis"):
    import redis
    from redis.backoff import NoBackoff
    from redis.client import Pipeline, PubSub, Redis
    from redis.connection import BlockingConnectionPool, Connection, ConnectionPool, UnixDomainSocketConnection
    from redis.lock import Lock
    from redis.retry import Retry

from tokenscope.integrations._redis_client import GuardedClient
from tokenscope.integrations._redis_connection import GuardedConnection, guarded_class

__all__ = ["instrument", "uninstrument"]

# Where callers wait for a connection: redis-py's queues, and ours in their place.
_SLOTS: dict[Any, Any] = {queue.LifoQueue: sync.LifoQueue, queue.Queue: sync.Queue}


def instrument(client: Any) -> Any:
    """Make the calls of a redis-py client end with the current token, and return that client.

    Its connection pool is guarded, and with it the commands of every client that shares the pool. Pipelines, locks and
    subscriptions have to come from this client, from here on. Outside any scope nothing changes. Idempotent. Not
    thread-safe: before the client is shared. Connections that are open are closed.

    On a cancel the blocked call raises `Cancelled` with the token's reason, and the transport's error, if there was
    one, as its ``__cause__``; no attempt follows, and the connection is closed. Whether the server has carried out, or
    will yet carry out, a command that was cut is not known. A subscription subscribes again when it is used again; a
    lock can be released in a cancelled thread too, for 30 seconds at most.

    Raises:
        TypeError: It is no such client, but a cluster's, a pipeline or an asynchronous one for example.
        TokenScopeError: Its pool caches on the client's side, or has connections or a queue of its own kind.
        redis.ConnectionError: It has a single connection, which cannot be made anew.
    """
    _check_client(client)
    pool = client.connection_pool
    if not issubclass(pool.connection_class, GuardedConnection):
        _check_pool(pool)
        _rebuild(pool, guarded_class(pool.connection_class), _SLOTS)
        _reconnect(client)
    client.__class__ = in_front_of(type(client), GuardedClient)
    return client


def uninstrument(client: Any) -> Any:
    """Undo `instrument`: the client and its pool are as they were. Idempotent; not thread-safe, closes as that does.

    Raises:
        TypeError: It is no client of redis-py.
        redis.ConnectionError: As for `instrument`.
    """
    _check_client(client)
    pool = client.connection_pool
    if issubclass(pool.connection_class, GuardedConnection):
        _rebuild(pool, pool.connection_class.plain, {ours: theirs for theirs, ours in _SLOTS.items()})
        _reconnect(client)
    if isinstance(client, GuardedClient):
        client.__class__ = type(client).__bases__[1]
    return client


def _check_client(client: Any) -> None:
    if isinstance(client, Pipeline):
        raise TypeError(f"client must not be a pipeline, as {client!r} is: instrument the client that made it")
    if isinstance(client, Redis):
        return
    if type(client).__module__.startswith("redis.asyncio"):
        raise TypeError(f"client must not be asynchronous, as {client!r} is: cancel the asyncio task that awaits it")
    raise TypeError(f"client must be a redis.Redis, not {client!r} (clusters are not supported)")


def _check_pool(pool: Any) -> None:
    if getattr(pool, "cache", None) is not None:
        raise TokenScopeError(
            "the client caches on its side (cache_config=...): its connections read for one another, so a cut could not"
            " be kept from others; make it without"
        )
    kind = getattr(pool, "queue_class", queue.LifoQueue)
    if kind not in _SLOTS:
        raise TokenScopeError(
            f"the pool keeps its connections in a {kind!r}, where a cancel could not end the wait for one; only"
            " queue.LifoQueue and queue.Queue are supported"
        )


def _rebuild(pool: Any, connection_class: type, queues: dict[Any, Any]) -> None:
    pool.disconnect()
    pool.connection_class = connection_class
    if hasattr(pool, "queue_class"):
        pool.queue_class = queues[pool.queue_class]
    pool.reset()


def _reconnect(client: Any) -> None:
    """Give a client that keeps one connection to itself (``single_connection_client``) one of the new kind."""
    if client.connection is None:
        return
    get = client.connection_pool.get_connection
    # A command's name, once wanted and never used; now to give one is deprecated.
    named = inspect.signature(get).parameters["command_name"].default is inspect.Parameter.empty
    client.connection = get("_") if named else get()


def _check_hooks() -> None:
    """Refuse a redis-py without what is used and not promised by its documentation.

    Raises:
        ImportError: Something is not there.
    """
    link = ("_connect", "_sock", "retry", "socket_connect_timeout", "socket_timeout", "disconnect")
    steps = ("connect", "send_packed_command", "read_response", "can_read")
    tcp: Any = Connection
    unix: Any = UnixDomainSocketConnection
    blocking: Any = BlockingConnectionPool
    pool = ConnectionPool()  # nothing in here connects before it is used
    wanted: dict[Any, tuple[str, ...]] = {
        tcp(): (*link, *steps, "host", "port", "socket_type", "socket_keepalive", "socket_keepalive_options"),
        unix(): (*link, *steps, "path"),
        Retry(NoBackoff(), 0): ("_backoff",),
        pool: ("connection_class", "reset", "disconnect"),
        blocking(max_connections=1): ("queue_class", "pool"),
        Pipeline(pool, {}, True, None): ("reset", "watching", "connection"),
        PubSub(pool): ("subscribed_event",),
        Redis(connection_pool=pool): ("connection", "pipeline", "pubsub", "lock"),
        Lock: ("acquire", "release"),
    }
    missing = [name for owner, names in wanted.items() for name in names if not hasattr(owner, name)]
    if missing:
        raise ImportError(
            f"redis {redis.__version__} is not supported: it has no {', '.join(missing)}; use redis>=5.0.1,<9"
        )


_check_hooks()
