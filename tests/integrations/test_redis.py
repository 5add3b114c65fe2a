"""redis-py against a small Redis that hangs on cue; the real one is in compat/."""

from __future__ import annotations

import queue
import select

import pytest
import redis
import redis.asyncio
from peers import Attempt, blocked_in, wait_until
from peers.redis import RedisServer
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from redis_phases import LONG, PHASES, Bench

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    TaskCancelled,
    TokenScopeError,
    check,
    fail_after,
    use_token,
)
from tokenscope._core.current import uninterruptible
from tokenscope.integrations import redis as integration
from tokenscope.integrations.redis import instrument, uninstrument

WAIT = 10.0

MATRIX = [
    pytest.param(name, transport, id=f"{name}-{transport}")
    for name, (_phase, transports) in PHASES.items()
    for transport in transports
]
# Where the cancel makes the transport raise, so that there is an error to chain (docs/decisions/0007).
WITH_CAUSE = {"connect", "handshake"}


@pytest.fixture
def make_bench(certificates):
    """Return a maker of benches, each closed with all its servers when the test ends."""
    benches: list[Bench] = []

    def make(transport: str = "tcp") -> Bench:
        benches.append(Bench(transport, certificates))
        return benches[-1]

    yield make
    for bench in benches:
        bench.exits.close()


@pytest.fixture
def bench(make_bench):
    return make_bench()


@pytest.fixture
def server(bench):
    return bench.server()


@pytest.fixture
def client(bench, server):
    return bench.client(server)


@pytest.fixture
def one_slot(bench, server):
    """A client whose pool has one connection."""
    pool = redis.BlockingConnectionPool(max_connections=1, timeout=WAIT, **bench.address(server))
    return bench.own(instrument(redis.Redis(connection_pool=pool)))


def names(server: RedisServer) -> list[str]:
    return [command[0] for command in server.log]


def nothing_is_out(client: redis.Redis) -> bool:
    """Whether the pool has all its connections back."""
    pool = client.connection_pool
    if isinstance(pool, redis.BlockingConnectionPool):
        return pool.pool.full()
    return pool._in_use_connections <= {client.connection}


def cut(call, token: CancellationToken, server: RedisServer) -> BaseException:
    """Cancel a call that hangs at the server, and return what it raised."""
    server.reached.clear()
    attempt = Attempt(call, token)
    assert server.reached.wait(WAIT)
    token.cancel("the reader left")
    return attempt.failure()


@pytest.mark.parametrize(("name", "transport"), MATRIX)
def test_cancel_in_this_phase_raises_closes_and_never_resends(make_bench, name, transport):
    """In each phase: Cancelled with the reason, the server sees the close, and nothing is sent twice."""
    with PHASES[name][0](make_bench(transport)) as stage:
        token = CancellationToken()
        attempt = Attempt(stage.call, token)
        stage.reached(attempt)
        assert token.cancel("the user left", tag="tab-closed")
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        assert failure.reason is token.reason
        assert isinstance(failure.__cause__, Exception) or (failure.__cause__ is None and name not in WITH_CAUSE)
        if stage.server is not None:
            assert not stage.sees_close or stage.server.closed.wait(5)
        if isinstance(stage.server, RedisServer):
            assert tuple(names(stage.server)) == stage.log
        if name == "pool-slot":
            return
        assert nothing_is_out(stage.client)
        if stage.log:
            assert stage.client.get("key") == b"value"


@pytest.mark.parametrize(("name", "transport"), MATRIX)
def test_deadline_of_the_token_ends_this_phase(make_bench, name, transport):
    """In each phase the token's time is all there is; the boundary makes it DeadlineExceeded."""
    with PHASES[name][0](make_bench(transport)) as stage:

        def call() -> None:
            with fail_after(0.3):
                stage.call()

        assert isinstance(Attempt(call).failure(), DeadlineExceeded)


@pytest.mark.parametrize(("name", "transport"), MATRIX)
def test_already_cancelled_sends_nothing(make_bench, name, transport):
    """A call under a cancelled token raises before a byte leaves this machine, and harms no idle connection."""
    with PHASES[name][0](make_bench(transport)) as stage:
        before = stage.server.connections if stage.server else 0
        token = CancellationToken()
        token.cancel("too late")
        with use_token(token), pytest.raises(Cancelled, match="too late"):
            stage.call()
        if isinstance(stage.server, RedisServer):
            assert stage.server.connections == before
            assert names(stage.server) == (["WATCH"] if name == "pool-slot" else [])


def test_a_call_that_begins_cancelled_harms_no_idle_connection(client, server):
    """The next one finds the same connection in the pool."""
    assert client.get("key") == b"value"
    token = CancellationToken()
    token.cancel()
    with use_token(token), pytest.raises(Cancelled):
        client.get("key")
    assert client.get("key") == b"value"
    assert server.connections == 1


# --- pipelines ----------------------------------------------------------------------------------------------


def test_cancelled_leaves_the_with_of_a_pipeline(one_slot, server):
    """Cut while it watches: no UNWATCH is sent after it, no other error hides it, and the pool has its place back."""

    def work() -> None:
        with one_slot.pipeline() as pipeline:
            pipeline.watch("key")
            pipeline.get("hang")

    token = CancellationToken()
    failure = cut(work, token, server)
    assert type(failure) is Cancelled
    assert failure.reason is token.reason
    assert names(server) == ["WATCH", "GET"]
    assert one_slot.get("key") == b"value"


def test_a_server_that_is_gone_does_not_hide_the_cancel(bench):
    """The same if nobody listens any more when the pipeline is left."""
    with RedisServer() as server:
        client = bench.client(server)

        def work() -> None:
            with client.pipeline() as pipeline:
                pipeline.watch("key")
                try:
                    pipeline.get("hang")
                finally:
                    server.stop()

        assert type(cut(work, CancellationToken(), server)) is Cancelled
    assert nothing_is_out(client)


def test_a_pipeline_that_was_cut_by_an_inner_deadline_does_not_connect_to_unwatch(one_slot, server):
    """Its `with` is left under a token that is not cancelled: the server forgot the WATCH with the connection."""

    def work() -> None:
        with one_slot.pipeline() as pipeline:
            pipeline.watch("key")
            with fail_after(0.2):
                pipeline.get("hang")

    assert isinstance(Attempt(work, CancellationToken()).failure(), DeadlineExceeded)
    assert names(server) == ["WATCH", "GET"]
    assert server.connections == 1
    assert one_slot.get("key") == b"value"


def test_a_pipeline_that_nobody_cut_unwatches_and_keeps_its_connection(one_slot, server):
    """As without tokenscope."""
    with use_token(CancellationToken()), one_slot.pipeline() as pipeline:
        pipeline.watch("key")
        assert pipeline.get("key") == b"value"
    assert one_slot.get("key") == b"value"
    assert names(server) == ["WATCH", "GET", "UNWATCH", "GET"]
    assert server.connections == 1


def test_an_unwatch_that_is_cut_costs_the_connection_and_gives_the_place_back(one_slot, server):
    """A cancel that comes when the `with` is already being left."""

    def work() -> None:
        with one_slot.pipeline() as pipeline:
            pipeline.watch("key")
            server.hangs_at = "UNWATCH"

    failure = cut(work, CancellationToken(), server)
    assert isinstance(failure, Cancelled)
    assert one_slot.get("key") == b"value"


def test_a_transaction_function_is_cut(client, server):
    """`client.transaction` uses pipelines of this client's."""
    failure = cut(lambda: client.transaction(lambda pipe: pipe.get("hang"), "key"), CancellationToken(), server)
    assert type(failure) is Cancelled
    assert names(server) == ["WATCH", "GET"]
    assert nothing_is_out(client)


# --- subscriptions ------------------------------------------------------------------------------------------


def test_a_subscription_that_was_cut_subscribes_again(client, server):
    """The next call connects anew, and the channel is the same."""
    with client.pubsub() as pubsub:
        pubsub.subscribe("news")
        assert pubsub.get_message(timeout=WAIT)["type"] == "subscribe"
        with pytest.raises(DeadlineExceeded), fail_after(0.1):
            pubsub.get_message(timeout=LONG)
        assert pubsub.get_message(timeout=WAIT)["type"] == "subscribe"
    assert names(server) == ["SUBSCRIBE", "SUBSCRIBE"]
    assert server.connections == 2


def test_who_shares_a_subscription_that_is_cut_is_told(client, server):
    """He is not cancelled himself: `TaskCancelled`, and no end that looks like the server's."""
    with client.pubsub() as pubsub:
        pubsub.subscribe("news")
        assert pubsub.get_message(timeout=WAIT)["type"] == "subscribe"
        connection = pubsub.connection
        innocent = Attempt(lambda: connection.can_read(timeout=LONG))
        token = CancellationToken()
        guilty = Attempt(lambda: connection.can_read(timeout=LONG), token)
        wait_until(lambda: blocked_in(innocent.thread, "call") and blocked_in(guilty.thread, "call"))
        token.cancel()
        assert isinstance(guilty.failure(), Cancelled)
        assert isinstance(innocent.failure(), TaskCancelled)


class PollingParser(redis._parsers._RESP2Parser):
    """Waits with `select` on the descriptor, and not in the socket: as hiredis' parser does."""

    def can_read(self, timeout=0):
        return bool(select.select([self._sock], [], [], timeout)[0])


def test_a_parser_that_waits_beside_the_socket_is_cut(bench, server):
    """A wait on the descriptor ends as one in the socket does."""
    pool = redis.ConnectionPool(parser_class=PollingParser, protocol=2, **bench.address(server))
    client = bench.own(instrument(redis.Redis(connection_pool=pool)))
    with client.pubsub() as pubsub:
        pubsub.subscribe("news")
        assert pubsub.get_message(timeout=WAIT)["type"] == "subscribe"
        token = CancellationToken()
        attempt = Attempt(lambda: pubsub.get_message(timeout=LONG), token)
        wait_until(lambda: blocked_in(attempt.thread, "can_read"))
        token.cancel()
        assert isinstance(attempt.failure(), Cancelled)


# --- locks --------------------------------------------------------------------------------------------------


def test_a_lock_is_released_in_a_cancelled_thread(client, server):
    """Others wait for it."""
    token = CancellationToken()
    with use_token(token), pytest.raises(Cancelled), client.lock("door"):
        assert "door" in server.store
        token.cancel()
        check()
    assert "door" not in server.store


def test_a_lock_keeps_its_time_limits(client):
    """`blocking=False`, and a `blocking_timeout` that the next pause would outlast, give up without a pause."""
    assert client.lock("key", blocking=False).acquire() is False
    assert client.lock("key", sleep=LONG, blocking_timeout=0.01).acquire() is False
    lock = client.lock("door", blocking_timeout=0.01)
    assert lock.acquire(token="mine") is True
    assert lock.local.token == b"mine"
    lock.release()


# --- pauses -------------------------------------------------------------------------------------------------


def test_a_retry_that_is_set_later_is_reached_and_the_users_own_stays_as_it_is(bench, server):
    """`set_retry` reaches the connections that exist; what was given is copied."""
    client = bench.client(server, retry_on_error=[redis.ConnectionError])
    assert client.get("key") == b"value"
    retry = Retry(ConstantBackoff(LONG), 3)
    backoff = retry._backoff
    client.set_retry(retry)
    with pytest.raises(DeadlineExceeded), fail_after(0.2):
        client.execute_command("GET", "rude")
    assert retry._backoff is backoff
    assert names(server).count("GET") <= 2


def test_an_error_that_nobody_cancelled_is_tried_again(bench, server):
    """Outside any scope, and inside one: the pauses are made, and the last error comes out."""
    retry = Retry(ConstantBackoff(0.001), 2)
    client = bench.client(server, retry=retry, retry_on_error=[redis.ConnectionError])
    for token in (None, CancellationToken()):
        server.log.clear()
        with pytest.raises(redis.ConnectionError):
            Attempt(lambda: client.get("rude"), token).value()
        assert names(server) == ["GET"] * 3


# --- who is not cancelled -----------------------------------------------------------------------------------


def test_a_command_in_an_uninterruptible_section_gets_its_answer(client, server):
    """A cancel waits for the end of the section, and the connection is kept."""
    server.store["slow"] = "done"

    def work() -> object:
        with uninterruptible():
            answer = client.get("slow")
        with pytest.raises(Cancelled):
            check()
        return answer

    token = CancellationToken()
    attempt = Attempt(work, token)
    assert server.reached.wait(WAIT)
    token.cancel()
    server.slow.set()
    assert attempt.value() == b"done"
    assert client.get("key") == b"value"
    assert server.connections == 1


def test_a_blocked_neighbour_on_the_same_pool_is_not_cut(client, server):
    """Only the connection of the call that was cancelled is closed."""
    server.store["slow"] = "done"
    neighbour = Attempt(lambda: client.get("slow"), CancellationToken())
    assert server.reached.wait(WAIT)
    assert isinstance(cut(lambda: client.get("hang"), CancellationToken(), server), Cancelled)
    server.slow.set()
    assert neighbour.value() == b"done"


def test_who_waits_for_a_connection_gets_the_place_of_one_that_was_cut(one_slot, server):
    """A cut does not cost the pool a place."""
    token = CancellationToken()
    guilty = Attempt(lambda: one_slot.get("hang"), token)
    assert server.reached.wait(WAIT)
    waiting = Attempt(lambda: one_slot.get("key"), CancellationToken())
    token.cancel()
    assert isinstance(guilty.failure(), Cancelled)
    assert waiting.value() == b"value"


def test_outside_of_any_scope_errors_are_those_of_redis(bench):
    """Refused, and a name that is none: the same classes and words as without tokenscope."""
    with RedisServer() as server:
        address = bench.address(server)
    for options in (address, {"host": "no-such-name.invalid"}):
        raised = []
        for make in (redis.Redis, lambda **rest: instrument(redis.Redis(**rest))):
            with pytest.raises(redis.RedisError) as caught:
                bench.own(make(retry=None, **options)).get("key")
            raised.append((type(caught.value), str(caught.value)))
        assert raised[0] == raised[1]


def test_no_answer_in_time_is_a_timeout_of_redis(bench, server):
    """`socket_timeout` keeps its meaning, within a scope too."""
    address = bench.address(server) | {"socket_timeout": 0.1}
    client = bench.own(instrument(redis.Redis(**address, retry=Retry(ConstantBackoff(0), 0))))
    with use_token(CancellationToken()), pytest.raises(redis.TimeoutError):
        client.get("hang")


# --- on and off ---------------------------------------------------------------------------------------------


def test_uninstrument_gives_client_and_pool_back_as_they_were(bench, server):
    """Classes, queue and the connections that are made from then on; both calls may be made twice."""
    pool = redis.BlockingConnectionPool(max_connections=2, timeout=WAIT, **bench.address(server))
    client = bench.own(redis.Redis(connection_pool=pool))
    before = (type(client), pool.connection_class, pool.queue_class, type(pool.pool), type(client.pipeline()))
    assert instrument(instrument(client)) is client
    assert isinstance(client, redis.Redis)
    assert type(client) is not before[0]
    assert client.get("key") == b"value"
    assert uninstrument(uninstrument(client)) is client
    after = (type(client), pool.connection_class, pool.queue_class, type(pool.pool), type(client.pipeline()))
    assert after == before
    token = CancellationToken()
    token.cancel()
    with use_token(token):
        assert client.get("key") == b"value"


def test_a_client_with_one_connection_gets_one_of_the_new_kind(bench, server):
    """And one of the old kind back."""
    client = bench.own(redis.Redis(**bench.address(server), single_connection_client=True))
    plain = type(client.connection)
    instrument(client)
    assert type(client.connection) is not plain
    assert client.get("key") == b"value"
    uninstrument(client)
    assert type(client.connection) is plain
    assert client.get("key") == b"value"


@pytest.mark.parametrize("what", ["redis://localhost", None, redis.ConnectionPool(), redis.asyncio.Redis()])
def test_what_is_no_client_is_refused(what):
    """The message names it."""
    with pytest.raises(TypeError, match="client must"):
        instrument(what)
    with pytest.raises(TypeError, match="client must"):
        uninstrument(what)


def test_a_pipeline_is_no_client(client):
    """It would be instrumented too late."""
    with pytest.raises(TypeError, match="pipeline"):
        instrument(client.pipeline())


def test_a_pool_that_cannot_be_guarded_is_refused():
    """Its own kind of connection, or of queue: the client is as before."""

    class Odd(redis.connection.AbstractConnection):
        host = ""

        def repr_pieces(self):
            return []

        _connect = _host_error = _error_message = repr_pieces

    class Line(queue.LifoQueue):
        pass

    for pool, word in (
        (redis.ConnectionPool(connection_class=Odd), "Odd"),
        (redis.BlockingConnectionPool(queue_class=Line), "Line"),
    ):
        client = redis.Redis(connection_pool=pool)
        with pytest.raises(TokenScopeError, match=word):
            instrument(client)
        assert type(client) is redis.Redis


def test_caching_on_the_clients_side_is_refused():
    """There connections read for one another."""
    config = pytest.importorskip("redis.cache").CacheConfig()
    with pytest.raises(TokenScopeError, match="caches"):
        instrument(redis.Redis(protocol=3, cache_config=config))


def test_a_connection_class_of_the_users_own_stays_on_top(bench, server):
    """What it adds is still there, and its calls are cut."""

    class Mine(redis.Connection):
        def on_connect(self):
            super().on_connect()
            self.greeted = True

    pool = redis.ConnectionPool(connection_class=Mine, **bench.address(server))
    client = bench.own(instrument(redis.Redis(connection_pool=pool)))
    assert isinstance(cut(lambda: client.get("hang"), CancellationToken(), server), Cancelled)


def test_a_redis_without_a_hook_is_refused_by_name(monkeypatch):
    """The error says what is missing, and which versions have it."""
    monkeypatch.delattr(redis.client.Pipeline, "reset")
    monkeypatch.setattr(redis.client.Pipeline, "__init__", lambda *_: None)
    monkeypatch.setattr(redis.client.Pipeline, "__del__", lambda _: None)
    with pytest.raises(ImportError, match=r"not supported: it has no watching, .*redis>=5\.0\.1"):
        integration._check_hooks()
