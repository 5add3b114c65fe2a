"""Every phase of a Redis call in which a client can be blocked, each with a server that makes it so."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from peers import Attempt, Authority, FullBacklog, Peer, blocked_in, wait_until
from peers import scripts as play
from peers.redis import RedisServer
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from tokenscope.integrations.redis import instrument

UPLOAD = 64 * 1024 * 1024  # more than any pair of socket buffers takes
LONG = 60.0  # a pause that no test sits out


@dataclass
class Bench:
    """What the phases are built with: certificates for `tls`, a path for `unix`."""

    transport: str
    authority: Authority
    exits: ExitStack = field(default_factory=ExitStack)

    def server(self) -> RedisServer:
        tls = self.authority if self.transport == "tls" else None
        path = ""
        if self.transport == "unix":
            path = str(Path(self.exits.enter_context(tempfile.TemporaryDirectory(prefix="redis-"))) / "socket")
        return self.exits.enter_context(RedisServer(tls, path))

    def client(self, peer: Any, **options: Any) -> redis.Redis:
        """Return a client of the peer that is cancellable and has no time limit of its own."""
        return self.own(instrument(redis.Redis(**self.address(peer), **options)))

    def address(self, peer: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"socket_timeout": None}
        if getattr(peer, "path", ""):
            return options | {"unix_socket_path": peer.path}
        options |= {"host": "127.0.0.1", "port": peer.port}
        if self.transport == "tls":
            options |= {"ssl": True, "ssl_ca_certs": self.authority.ca_file, "ssl_check_hostname": True}
        return options

    def own(self, client: redis.Redis) -> redis.Redis:
        self.exits.callback(client.connection_pool.disconnect)
        self.exits.callback(client.close)
        return client


@dataclass
class Stage:
    """A call that will block.

    Attributes:
        call: Makes it.
        reached: Returns once the call is blocked where it should be.
        client: Whose call it is.
        server: The server that looks on; None where nobody is connected.
        log: What the server has been asked at the end; one more would be a resend.
        sees_close: Whether the server sees the client hang up.
    """

    call: Callable[[], Any]
    reached: Callable[[Attempt], None]
    client: redis.Redis
    server: RedisServer | None = None
    log: tuple[str, ...] = ()
    sees_close: bool = True


Phase = Callable[[Bench], AbstractContextManager[Stage]]


def wait_for(event: threading.Event) -> None:
    assert event.wait(5), "the server never got there"


def simple(call: Callable[[Any], object], *log: str, **options: Any) -> Phase:
    """One call to one server, which hangs."""

    @contextmanager
    def phase(bench: Bench) -> Iterator[Stage]:
        server = bench.server()
        client = bench.client(server, **options)
        yield Stage(lambda: call(client), lambda _: wait_for(server.reached), client, server, log)

    return phase


def silent(call: Callable[[Any], object], inside: str, *log: str, sees_close: bool = True, **options: Any) -> Phase:
    """As `simple`; there is nothing for which the server could know that somebody waits."""

    @contextmanager
    def phase(bench: Bench) -> Iterator[Stage]:
        server = bench.server()
        client = bench.client(server, **options)

        def reached(attempt: Attempt) -> None:
            wait_until(lambda: len(server.log) == len(log) and blocked_in(attempt.thread, inside))

        yield Stage(lambda: call(client), reached, client, server, log, sees_close)

    return phase


def piped(client: Any) -> object:
    return client.pipeline(transaction=False).set("a", "b").get("hang").execute()


def transaction(client: Any) -> object:
    return client.pipeline().set("a", "b").get("hang").execute()


def watching(client: Any) -> object:
    with client.pipeline() as pipeline:
        pipeline.watch("key")
        return pipeline.get("hang")


def listening(client: Any) -> object:
    with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("news")
        return list(pubsub.listen())


def polling(client: Any) -> object:
    with client.pubsub() as pubsub:
        pubsub.subscribe("news")
        assert pubsub.get_message(timeout=LONG)["type"] == "subscribe"
        return pubsub.get_message(timeout=LONG)


def unsubscribed(client: Any) -> object:
    with client.pubsub() as pubsub:
        return pubsub.get_message(timeout=LONG)


def monitoring(client: Any) -> object:
    with client.monitor() as monitor:
        return monitor.next_command()


@contextmanager
def pool_slot(bench: Bench) -> Iterator[Stage]:
    """All connections are taken, and the pool makes callers wait."""
    server = bench.server()
    if bench.transport == "tls":
        kind: Any = redis.SSLConnection
    else:
        kind = redis.UnixDomainSocketConnection if bench.transport == "unix" else redis.Connection
    options = bench.address(server)
    options.pop("ssl", None)
    if "unix_socket_path" in options:
        options["path"] = options.pop("unix_socket_path")
    pool = redis.BlockingConnectionPool(max_connections=1, timeout=LONG, connection_class=kind, **options)
    client = bench.own(instrument(redis.Redis(connection_pool=pool)))
    with client.pipeline() as holder:
        holder.watch("key")
        yield Stage(
            lambda: client.get("key"),
            lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "get_connection")),
            client,
            server,
            ("WATCH",),
            sees_close=False,
        )


@contextmanager
def name_lookup(bench: Bench) -> Iterator[Stage]:
    """The resolver does not answer."""
    asked, answer = threading.Event(), threading.Event()

    def getaddrinfo(*_: object, **__: object) -> Any:
        asked.set()
        answer.wait(LONG)
        raise socket.gaierror(socket.EAI_AGAIN, "the test is over")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        client = bench.own(instrument(redis.Redis("a-name.test", ssl=bench.transport == "tls")))
        try:
            yield Stage(lambda: client.get("key"), lambda _: wait_for(asked), client)
        finally:
            answer.set()
            wait_until(lambda: not [t for t in threading.enumerate() if t.name == "tokenscope-resolve"])


@contextmanager
def tcp_connect(bench: Bench) -> Iterator[Stage]:
    """The SYN is not answered."""
    with FullBacklog() as backlog:
        client = bench.client(backlog)
        yield Stage(
            lambda: client.get("key"), lambda _: wait_until(lambda: backlog.connecting() == 1), client, sees_close=False
        )


@contextmanager
def handshake(bench: Bench) -> Iterator[Stage]:
    """The server accepts and never says hello."""
    peer: Any = bench.exits.enter_context(Peer(play.never_answers))
    client = bench.client(peer)
    yield Stage(
        lambda: client.get("key"),
        lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "do_handshake")),
        client,
        peer,
    )


def patient() -> dict[str, Any]:
    return {"retry": Retry(ConstantBackoff(LONG), 3), "retry_on_error": [redis.ConnectionError]}


ALL, TCP, TLS = ("tcp", "tls", "unix"), ("tcp",), ("tls",)
SUBSCRIBED = ("SUBSCRIBE",)

#: By name: the phase, and the transports it exists on.
PHASES: dict[str, tuple[Phase, tuple[str, ...]]] = {
    "pool-slot": (pool_slot, ALL),
    "name-lookup": (name_lookup, ("tcp", "tls")),
    "connect": (tcp_connect, ("tcp", "tls")),
    "handshake": (handshake, TLS),
    "introduction": (simple(lambda client: client.get("key"), password="hang"), ALL),
    "upload": (simple(lambda client: client.set("deaf", b"u" * UPLOAD), "SET"), ALL),
    "answer": (simple(lambda client: client.get("hang"), "GET"), ALL),
    "answer-resp3": (simple(lambda client: client.get("hang"), "GET", protocol=3), ALL),
    "half-answer": (simple(lambda client: client.get("half"), "GET"), ALL),
    "blpop": (simple(lambda client: client.blpop("list", 0), "BLPOP"), ALL),
    "scan-iter": (simple(lambda client: list(client.scan_iter()), "SCAN", "SCAN"), ALL),
    "pipeline": (simple(piped, "SET", "GET"), ALL),
    "transaction": (simple(transaction, "MULTI", "SET", "GET", "EXEC"), ALL),
    "watch": (simple(watching, "WATCH", "GET"), ALL),
    "one-connection": (simple(lambda client: client.get("hang"), "GET", single_connection_client=True), ALL),
    "listen": (silent(listening, "call", *SUBSCRIBED), ALL),
    "listen-resp3": (silent(listening, "call", *SUBSCRIBED, protocol=3), ALL),
    "get-message": (silent(polling, "call", *SUBSCRIBED), ALL),
    "get-message-resp3": (silent(polling, "call", *SUBSCRIBED, protocol=3), ALL),
    "not-subscribed": (silent(unsubscribed, "wait", sees_close=False), TCP),
    "monitor": (silent(monitoring, "next_command", "MONITOR"), ALL),
    "backoff": (silent(lambda client: client.get("rude"), "compute", "GET", sees_close=False, **patient()), TCP),
    "lock": (
        silent(lambda client: client.lock("key", sleep=LONG).acquire(), "sleep", "SET", sees_close=False),
        TCP,
    ),
}
