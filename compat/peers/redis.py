"""redis-py: the commands that wait in the server, and those that wait for what others publish.

Where the server is, the variables `REDIS_HOST` and `REDIS_PORT` say.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

import redis

from tokenscope.integrations.redis import instrument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# A connection that is cut while it is set up says so in the words of the socket.
Error = (redis.RedisError, OSError)

_WHERE: dict[str, Any] = {
    "host": os.environ.get("REDIS_HOST", "127.0.0.1"),
    "port": int(os.environ.get("REDIS_PORT", "6379")),
}
_NAME = f"compat-{os.getpid()}"

# What CLIENT LIST says of a connection for which the server waits: blocked or subscribed.
_WAITING = set("bP")


class Server:
    """The server, as the story sees it."""

    def __init__(self) -> None:
        self._watch = redis.Redis(**_WHERE, decode_responses=True)
        self._watch.ping()

    def close(self) -> None:
        self._watch.delete(f"{_NAME}-gate")
        self._watch.close()

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        client = instrument(redis.Redis(**_WHERE, client_name=_NAME, socket_timeout=None))
        try:
            yield client
        finally:
            client.close()
            client.connection_pool.disconnect()

    def _ours(self) -> list[dict[str, str]]:
        return [found for found in self._watch.client_list() if found["name"] == _NAME]

    def working(self) -> int:
        """How many connections the server waits for."""
        return sum(bool(_WAITING & set(found["flags"])) for found in self._ours())

    def connections(self) -> list[str]:
        return [f"connection {found['id']}" for found in self._ours()]

    def open_gate(self) -> None:
        self._watch.rpush(f"{_NAME}-gate", "open")


def ask(client: Any, text: str) -> str:
    """Let the server say it."""
    return str(client.echo(text).decode())


def brief(client: Any) -> None:
    """A command that takes about as long as a cancel needs."""
    assert client.blpop([f"{_NAME}-nothing"], timeout=0.003) is None


def wait_for_gate(client: Any) -> None:
    """Wait for what `open_gate` gives."""
    assert client.blpop([f"{_NAME}-gate"])[1] == b"open"


def blocking_pop(client: Any) -> None:
    client.blpop([f"{_NAME}-nothing"])


def stream_read(client: Any) -> None:
    client.xread({f"{_NAME}-stream": "$"}, block=0)


def in_a_pipeline(client: Any) -> None:
    with client.pipeline(transaction=False) as pipeline:
        pipeline.echo("first").blpop([f"{_NAME}-nothing"]).execute()


def listen(client: Any) -> None:
    with client.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(f"{_NAME}-channel")
        for _message in pubsub.listen():
            pass


CALLS: Mapping[str, Callable[[Any], object]] = {
    call.__name__: call for call in (blocking_pop, stream_read, in_a_pipeline, listen)
}
