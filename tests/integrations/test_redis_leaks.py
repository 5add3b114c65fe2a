"""The leak run of redis-py: cancels at random moments of random calls, with innocent threads on the same client."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import redis
from peers import Attempt
from peers.redis import RedisServer

from tokenscope import CancellationToken, Cancelled, use_token
from tokenscope.integrations.redis import instrument

if TYPE_CHECKING:
    from collections.abc import Callable

CANCELS = 1_600  # calls that are cancelled, spread over ...
WORKERS = 8
INNOCENTS = 3
PLACES = WORKERS + INNOCENTS - 2  # in the pool: some wait for one
# A cancel comes so late at most: also in connect, in the handshake (which loads certificates first) and after the end.
LATEST_MS = {"tcp": 8, "tls": 40}


def watched(client: Any) -> object:
    with client.pipeline() as pipeline:
        pipeline.watch("key")
        pipeline.multi()
        return pipeline.get("key").get("key").execute()


def watched_and_hanging(client: Any) -> object:
    with client.pipeline() as pipeline:
        pipeline.watch("key")
        return pipeline.get("hang")


def subscribed(client: Any) -> object:
    with client.pubsub() as pubsub:
        pubsub.subscribe("news")
        return [message for message in pubsub.listen() if message["type"] == "message"]


ANSWERED: dict[str, tuple[Callable[[Any], object], object]] = {
    "get": (lambda client: client.get("key"), b"value"),
    "pipeline": (lambda client: client.pipeline(transaction=False).get("key").get("key").execute(), [b"value"] * 2),
    "transaction": (lambda client: client.pipeline().get("key").get("key").execute(), [b"value"] * 2),
    "watched": (watched, [b"value"] * 2),
}
ENDLESS: dict[str, Callable[[Any], object]] = {
    "hang": lambda client: client.get("hang"),
    "half": lambda client: client.get("half"),
    "blpop": lambda client: client.blpop("list", 0),
    "watched": watched_and_hanging,
    "subscribed": subscribed,
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("transport", ["tcp", "tls"])
def test_random_cancels_harm_no_innocent_and_leak_nothing(certificates, transport):
    """No third outcome, no wrong answer, no harm to others, no place of the pool lost; nothing is left open."""
    tls = certificates if transport == "tls" else None
    options: dict[str, Any] = {"connection_class": redis.Connection}
    if tls:
        options = {"connection_class": redis.SSLConnection, "ssl_ca_certs": tls.ca_file, "ssl_check_hostname": True}
    with RedisServer(tls) as server:
        pool = redis.BlockingConnectionPool(
            max_connections=PLACES, timeout=60, host="127.0.0.1", port=server.port, socket_timeout=60, **options
        )
        client = instrument(redis.Redis(connection_pool=pool))
        stop = threading.Event()
        innocents = [Attempt(lambda: ask_until(stop, client)) for _ in range(INNOCENTS)]
        workers = [
            Attempt(lambda seed=seed: many_cancels(seed, client, LATEST_MS[transport])) for seed in range(WORKERS)
        ]
        try:
            outcomes = [outcome for worker in workers for outcome in worker.value(150)]
        finally:
            stop.set()
        assert all(innocent.value(10) > 0 for innocent in innocents)
        assert set(outcomes) <= {"cancelled", "answered"}
        assert len(outcomes) == CANCELS // WORKERS * WORKERS
        assert outcomes.count("cancelled") > CANCELS // 2
        assert pool.pool.qsize() == PLACES
        pool.disconnect()


def ask_until(stop: threading.Event, client: Any) -> int:
    """Ask again and again; every answer must be the right one."""
    asked = 0
    while not stop.is_set():
        for call, answer in ANSWERED.values():
            assert call(client) == answer
        asked += 1
    return asked


def many_cancels(seed: int, client: Any, latest_ms: int) -> list[str]:
    """Do one thread's share."""
    dice = random.Random(seed)
    return [one_cancel(dice, client, latest_ms) for _ in range(CANCELS // WORKERS)]


def one_cancel(dice: random.Random, client: Any, latest_ms: int) -> str:
    """Make a random call and cancel it at a random moment."""
    token = CancellationToken()
    endless = dice.random() < 0.7
    call, right = (dice.choice(list(ENDLESS.values())), None) if endless else dice.choice(list(ANSWERED.values()))
    timer = threading.Timer(dice.random() * latest_ms / 1000, token.cancel, ["random"])
    timer.start()
    try:
        with use_token(token):
            answer = call(client)
    except Cancelled as error:
        return "cancelled" if error.reason is token.reason else "cancelled for another reason"
    finally:
        timer.cancel()
        timer.join()
    assert not endless
    assert answer == right
    return "answered"
