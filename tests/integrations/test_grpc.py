"""gRPC: a cancel ends a call of each kind, in each phase, tells the server, and harms nobody else."""

from __future__ import annotations

import gc
import random
import socket
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from peers import Attempt, wait_until
from peers.grpc_server import GrpcServer, method

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    ThreadScope,
    current_token,
    fail_after,
    shield,
    sync,
    use_token,
)
from tokenscope._core.current import uninterruptible
from tokenscope.integrations.grpc import CancellableChannel, cancellable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def _server():
    """One server and one plain channel for all: gRPC takes its time to end either."""
    with GrpcServer() as server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert method(channel, "Answer")(b"a first call") == b"answer to a first call"
        yield server, channel


@pytest.fixture
def server(_server):
    """The server, with nothing noted."""
    _server[0].refresh()
    return _server[0]


@pytest.fixture
def plain(_server):
    """A channel as gRPC makes it."""
    return _server[1]


@pytest.fixture
def channel(plain):
    """The same, cancellable."""
    return cancellable(plain)


PHASES: dict[str, Callable[[Any], Any]] = {
    "unary: answer": lambda channel: method(channel, "Hang")(b""),
    "unary: with_call": lambda channel: method(channel, "Hang").with_call(b""),
    "unary: future": lambda channel: method(channel, "Hang").future(b"").result(),
    "unary: exception of a future": lambda channel: method(channel, "Hang").future(b"").exception(),
    "stream: first message": lambda channel: list(method(channel, "HangFirst")(b"")),
    "stream: next message": lambda channel: list(method(channel, "Drip")(b"")),
    "stream: metadata": lambda channel: method(channel, "HangFirst")(b"").initial_metadata(),
}


@pytest.mark.parametrize("name", PHASES)
def test_a_cancel_in_this_phase_raises_and_tells_the_server(server, channel, name):
    """`Cancelled` with the reason, gRPC's own error as the cause, the handler's context ends, one call was made."""
    token = CancellationToken()
    attempt = Attempt(lambda: PHASES[name](channel), token)
    assert server.reached.wait(10)
    token.cancel("the user left", tag="tab-closed")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert failure.reason is token.reason
    assert isinstance(failure.__cause__, grpc.RpcError | grpc.FutureCancelledError | None)
    assert server.gone.wait(10)
    assert len(server.calls) == 1


@pytest.mark.parametrize("name", ["Join", "Echo"])
def test_a_cancel_ends_a_call_whose_requests_are_still_drawn(server, channel, name):
    """The iterator runs on a thread of gRPC's, under the caller's token: it ends too."""
    token, begun, ended = CancellationToken(), threading.Event(), threading.Event()

    def requests() -> Iterator[bytes]:
        try:
            yield b"one"
            begun.set()
            current_token().wait()
            current_token().check()
        finally:
            ended.set()

    def call() -> Any:
        answer = method(channel, name)(requests())
        return answer if isinstance(answer, bytes) else list(answer)

    attempt = Attempt(call, token)
    assert begun.wait(10)
    token.cancel()
    assert isinstance(attempt.failure(), Cancelled)
    assert ended.wait(10)


def test_requests_may_wait_for_a_queue_of_ours(server, channel):
    """As an agent's conversation does: it is woken by the cancel, and its thread ends quietly."""
    token, queue = CancellationToken(), sync.Queue[bytes]()

    def conversation() -> list[bytes]:
        heard = []
        for message in method(channel, "Echo")(iter(queue.get, None)):
            heard.append(message)
            if len(heard) == 2:
                token.cancel()
        return heard

    queue.put(b"a")
    queue.put(b"b")
    assert isinstance(Attempt(conversation, token).failure(), Cancelled)
    assert server.calls == ["Echo"]


def test_connecting_is_cancelled(plain):
    """A server that accepts and says nothing; the call waits for a channel that never gets ready."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        with cancellable(grpc.insecure_channel(address)) as channel:
            token = CancellationToken()
            attempt = Attempt(lambda: method(channel, "Answer")(b"", wait_for_ready=True), token)
            deaf.accept()[0].close()
            token.cancel()
            assert isinstance(attempt.failure(), Cancelled)


def test_a_cancelled_caller_calls_nobody(server, channel):
    """A call begins with a look at the token."""
    token = CancellationToken()
    token.cancel()
    with use_token(token):
        for name in ("Answer", "Count"):
            with pytest.raises(Cancelled):
                method(channel, name)(b"1")
    assert server.calls == []


def test_without_a_cancel_all_is_as_before(server, channel):
    """Answers, streams, metadata, errors and calls are gRPC's; under a token and outside of any."""

    def look() -> None:
        assert method(channel, "Answer")(b"x") == b"answer to x"
        answer, call = method(channel, "Answer").with_call(b"x", metadata=(("key", "value"),))
        assert (answer, call.code()) == (b"answer to x", grpc.StatusCode.OK)
        future = method(channel, "Answer").future(b"x")
        assert future.result(10) == b"answer to x"
        assert future.done()
        assert future.exception() is None
        stream = method(channel, "Count")(b"3")
        assert isinstance(stream, grpc.Call)
        assert list(stream) == [b"0", b"1", b"2"]
        assert stream.code() is grpc.StatusCode.OK
        assert method(channel, "Join")(iter([b"a", b"b"])) == b"a+b"
        assert list(method(channel, "Echo")(iter([b"a", b"b"]))) == [b"a", b"b"]
        with pytest.raises(grpc.RpcError) as refused:
            method(channel, "Refuse")(b"")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == "no such thing"

    look()
    with ThreadScope():
        look()


def test_ones_own_cancel_and_timeout_stay_grpcs(server, channel):
    """What the caller did himself is no cancel of the scope's."""
    with ThreadScope():
        stream = method(channel, "Drip")(b"")
        assert next(stream) == b"one"
        stream.cancel()
        with pytest.raises(grpc.RpcError) as cancelled:
            next(stream)
        assert cancelled.value.code() is grpc.StatusCode.CANCELLED
        with pytest.raises(grpc.RpcError) as late:
            method(channel, "Hang")(b"", timeout=0.05)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        future = method(channel, "Hang").future(b"")
        with pytest.raises(grpc.FutureTimeoutError):
            future.result(timeout=0.01)
        future.cancel()
        with pytest.raises(grpc.FutureCancelledError):
            future.result()


def test_the_deadline_is_sent_along(server, channel):
    """The server knows how long anybody waits for it; the caller's own limit holds if it is shorter."""
    with fail_after(60):
        method(channel, "Answer")(b"")
        assert server.left is not None
        assert 50 < server.left <= 61  # it is counted from when it arrives
        method(channel, "Answer")(b"", timeout=20)
        assert 10 < server.left <= 21
        method(channel, "Answer")(b"", timeout=100)
        assert 50 < server.left <= 61


@pytest.mark.parametrize("name", ["Hang", "Drip"])
def test_the_deadline_of_the_token_is_the_tokens(server, channel, name):
    """`DeadlineExceeded` from whoever owns it, and not gRPC's error, whichever clock is faster."""
    for _ in range(5):
        with pytest.raises(DeadlineExceeded), fail_after(0.05):
            answer = method(channel, name)(b"")
            list(answer)


def test_a_channel_may_have_a_token_of_its_own(server, plain):
    """It is added to the current one, also outside any scope."""
    token = CancellationToken()
    channel = cancellable(plain, token=token)
    attempt = Attempt(lambda: method(channel, "Hang")(b""))
    assert server.reached.wait(10)
    token.cancel()
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert failure.reason is token.reason


@pytest.mark.parametrize("protect", [shield, uninterruptible])
def test_a_shielded_call_is_not_cut(server, channel, protect):
    """A commit to another service runs to its end in a cancelled thread."""
    token = CancellationToken()
    with use_token(token):
        token.cancel()
        with protect():
            assert method(channel, "Answer")(b"x") == b"answer to x"
            assert list(method(channel, "Count")(b"2")) == [b"0", b"1"]
        with pytest.raises(Cancelled):
            method(channel, "Answer")(b"x")


def test_a_stream_stays_bound_to_the_token_it_was_opened_under(server, channel):
    """Whoever reads it is told of that token's cancel."""
    token = CancellationToken()
    with use_token(token):
        stream = method(channel, "Drip")(b"")
    assert next(stream) == b"one"
    token.cancel()
    with pytest.raises(Cancelled) as caught:
        next(stream)
    assert caught.value.reason is token.reason


def test_a_dropped_stream_is_cancelled_as_ever(server, channel):
    """The token does not keep it alive."""
    with ThreadScope():
        stream = method(channel, "Drip")(b"")
        assert next(stream) == b"one"
        assert server.reached.wait(10)
        del stream
        gc.collect()
        assert server.gone.wait(10)


def test_a_long_lived_token_does_not_collect_calls(server, channel):
    """What was registered for a call goes with it."""
    token = CancellationToken()
    with use_token(token):
        for _ in range(20):
            method(channel, "Answer")(b"")
            list(method(channel, "Count")(b"1"))
        more = token._more
        assert more is not None
        wait_until(lambda: not more.regs)


def test_innocents_on_the_same_channel_are_not_disturbed(server, channel):
    """Random cancels beside calls that nobody cancels: no third outcome, no wrong answer."""
    stop = threading.Event()

    def innocent() -> int:
        asked = 0
        while not stop.is_set():
            assert method(channel, "Answer")(b"%d" % asked) == b"answer to %d" % asked
            asked += 1
        return asked

    def victim(seed: int) -> list[str]:
        dice, outcomes = random.Random(seed), []
        for _ in range(60):
            token = CancellationToken(timeout=dice.random() / 100)
            try:
                with use_token(token):
                    if dice.random() < 0.5:
                        list(method(channel, "Count")(b"50"))
                    else:
                        method(channel, "Hang")(b"")
                outcomes.append("answered")
            except Cancelled as error:
                outcomes.append("cancelled" if error.reason is token.reason else "for another reason")
        return outcomes

    innocents = [Attempt(innocent) for _ in range(2)]
    victims = [Attempt(lambda seed=seed: victim(seed)) for seed in range(3)]
    try:
        outcomes = [outcome for each in victims for outcome in each.value(60)]
    finally:
        stop.set()
    assert all(each.value(10) for each in innocents)
    assert set(outcomes) <= {"answered", "cancelled"}
    assert outcomes.count("cancelled") > 60


def test_bad_input_is_refused_by_name(plain):
    """With the value."""
    with pytest.raises(TypeError, match=r"channel must be a grpc\.Channel, not 'localhost'"):
        cancellable("localhost")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="token must be"):
        cancellable(plain, token=5)  # type: ignore[arg-type]


def test_a_channel_passes_on_what_is_not_a_call(server):
    """Subscriptions, closing, and interceptors on either side."""
    states: list[Any] = []
    seen: list[str] = []

    class Interceptor(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            seen.append(details.method)
            return continuation(details, request)

    inner = grpc.intercept_channel(grpc.insecure_channel(f"127.0.0.1:{server.port}"), Interceptor())
    with cancellable(inner) as channel:
        assert isinstance(channel, CancellableChannel)
        channel.subscribe(states.append, try_to_connect=True)
        outer = grpc.intercept_channel(channel, Interceptor())
        with ThreadScope():
            assert method(outer, "Answer")(b"x") == b"answer to x"
        wait_until(lambda: grpc.ChannelConnectivity.READY in states)
        channel.unsubscribe(states.append)
    assert seen == ["/peer/Answer"] * 2
    with pytest.raises(ValueError, match="closed"):
        method(channel, "Answer")(b"x")
