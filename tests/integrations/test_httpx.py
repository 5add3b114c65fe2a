"""httpx and httpx2: a cancel ends a request in every phase, harms nobody else, and nothing else changes."""

from __future__ import annotations

import random
import socket
import ssl
import threading
from typing import Any

import httpx
import httpx2
import pytest
from httpx_phases import PHASES, Bench
from peers import Attempt, Peer, blocked_in, wait_until
from peers import scripts as play

from tokenscope import CancellationToken, Cancelled, DeadlineExceeded, TokenScopeError, fail_after, use_token
from tokenscope.integrations import httpx as ours
from tokenscope.integrations import httpx2 as ours2

FORKS = {"httpx": (httpx, ours), "httpx2": (httpx2, ours2)}
MATRIX = [
    pytest.param(fork, name, transport, id=f"{fork}-{name}-{transport}")
    for fork in FORKS
    for name, (_phase, transports) in PHASES.items()
    for transport in transports
]


@pytest.fixture
def make_bench(certificates):
    """Return a maker of benches, each closed with all its peers when the test ends."""
    benches: list[Bench] = []

    def make(fork: str, transport: str = "tcp", timeout: float | None = None) -> Bench:
        benches.append(Bench(*FORKS[fork], certificates if transport == "tls" else None, timeout))
        return benches[-1]

    yield make
    for bench in benches:
        bench.exits.close()


@pytest.mark.parametrize("timeout", [None, 30])
@pytest.mark.parametrize(("fork", "name", "transport"), MATRIX)
def test_cancel_in_this_phase_raises_closes_and_never_resends(make_bench, fork, name, transport, timeout):
    """In each phase: Cancelled with the reason, the server sees the close, and no request is sent twice."""
    bench = make_bench(fork, transport, timeout)
    with PHASES[name][0](bench) as stage:
        token = CancellationToken()
        attempt = Attempt(stage.call, token)
        stage.reached(attempt)
        assert token.cancel("the user left", tag="tab-closed")
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        assert failure.reason is token.reason
        if stage.peer is not None:
            assert stage.peer.closed.wait(5)
            assert stage.peer.requests == stage.requests


@pytest.mark.parametrize(("fork", "name", "transport"), MATRIX)
def test_deadline_of_the_token_ends_this_phase(make_bench, fork, name, transport):
    """In each phase the token's time is all there is; the boundary makes it DeadlineExceeded."""
    bench = make_bench(fork, transport)
    with PHASES[name][0](bench) as stage:

        def call() -> None:
            with fail_after(0.3):
                stage.call()

        assert isinstance(Attempt(call).failure(), DeadlineExceeded)


@pytest.mark.parametrize(("fork", "name", "transport"), MATRIX)
def test_already_cancelled_sends_nothing(make_bench, fork, name, transport):
    """A request under a cancelled token raises before a byte leaves this machine."""
    bench = make_bench(fork, transport)
    with PHASES[name][0](bench) as stage:
        before = stage.peer.connections if stage.peer else 0
        token = CancellationToken()
        token.cancel("too late")
        with use_token(token), pytest.raises(Cancelled, match="too late"):
            stage.call()
        assert (stage.peer.connections if stage.peer else 0) == before


@pytest.fixture(params=FORKS)
def bench(request, make_bench):
    """Return a bench of each fork, on TCP."""
    return make_bench(request.param)


def test_a_connection_is_used_again_and_a_late_cancel_does_not_reach_it(bench):
    """Once its response is done, a connection works for nobody; the next request finds it as good as new."""
    peer, client = bench.peer(play.answers(b"hello")), bench.client()
    first = CancellationToken()
    with use_token(first):
        assert client.get(peer.url()).content == b"hello"
    first.cancel()
    with use_token(CancellationToken()):
        assert client.get(peer.url()).content == b"hello"
    assert peer.connections == 1


def test_a_cut_connection_is_not_used_again(bench):
    """A cancel after the last byte and before the close of the response costs the connection, not the next request."""
    peer, client = bench.peer(play.answers(b"hello")), bench.client()
    token = CancellationToken()
    with use_token(token), client.stream("GET", peer.url()) as response:
        assert b"".join(response.stream) == b"hello"
        token.cancel()
    assert client.get(peer.url()).content == b"hello"
    assert peer.connections == 2


def test_a_response_stays_bound_to_the_token_it_was_opened_under(bench):
    """Whoever reads the body: the cancel of the request's token ends it."""
    peer, client = bench.peer(play.hangs_in_body("chunked")), bench.client()
    token = CancellationToken()
    with use_token(token):
        response = client.send(client.build_request("GET", peer.url()), stream=True)
    reader = Attempt(response.read, token)
    peer.reached.wait(5)
    token.cancel()
    assert isinstance(reader.failure(), Cancelled)
    assert peer.closed.wait(5)


def test_a_token_of_the_clients_own_ends_its_requests_too(bench):
    """``Client(token=...)`` adds a token to the current one."""
    mine = CancellationToken()
    peer, client = bench.peer(play.hangs_before_headers), bench.client(token=mine)
    attempt = Attempt(lambda: client.get(peer.url()), CancellationToken())
    assert peer.reached.wait(5)
    mine.cancel("this client is done")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert failure.reason is mine.reason


def test_a_cancelled_wait_for_a_connection_takes_none(bench):
    """The slot that it waited for is still there for the next one, and so is that of a body cut in the middle."""
    peer = bench.peer(play.by_path({"/hang": play.hangs_in_body("chunked")}, play.answers(b"hello")))
    client = bench.client(limits=bench.library.Limits(max_connections=1))
    token = CancellationToken()
    with client.stream("GET", peer.url("/hang")):
        waiting = Attempt(lambda: client.get(peer.url()), token)
        wait_until(lambda: blocked_in(waiting.thread, "wait"))
        token.cancel()
        assert isinstance(waiting.failure(), Cancelled)
    assert client.get(peer.url()).content == b"hello"


def test_errors_are_those_of_the_library(bench):
    """Timeouts, a refused connection, a broken answer: what the plain client would raise, with its request."""
    library, client = bench.library, bench.client()
    hangs = bench.peer(play.hangs_before_headers)
    with pytest.raises(library.ReadTimeout) as late:
        client.get(hangs.url(), timeout=0.05)
    assert str(late.value.request.url) == hangs.url()
    with pytest.raises(library.ConnectError):
        client.get("http://127.0.0.1:1/")
    with pytest.raises(library.RemoteProtocolError):
        client.get(bench.peer(lambda exchange: exchange.send(b"what?\r\n\r\n")).url())
    narrow = bench.client(limits=library.Limits(max_connections=1))
    slow = bench.peer(play.hangs_in_body("chunked"))
    with narrow.stream("GET", slow.url()), pytest.raises(library.PoolTimeout):
        narrow.get(slow.url(), timeout=library.Timeout(5, pool=0.05))
    with narrow.stream("GET", slow.url(), timeout=0.1) as response, pytest.raises(library.ReadTimeout):
        response.read()


def test_an_error_of_the_bodys_own_generator_is_raised_as_it_is(bench):
    """What the user's code raises while it is asked for the body is not ours to translate."""

    def body() -> Any:
        yield b"part"
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        bench.client().post(bench.peer(play.reads_body_late).url(), content=body())


def test_a_proxy_of_the_environment_is_used(bench, monkeypatch):
    """As the plain client does; ``trust_env=False`` turns it off."""
    proxy = bench.peer(play.answers(b"from the proxy"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy.url())
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    client = bench.client(trust_env=True)
    assert client.get("http://somewhere.test/").content == b"from the proxy"


def test_what_is_not_supported_is_refused_with_help(bench):
    """HTTP/2, proxies of scheme https, a plain transport, and a token that is none."""
    with pytest.raises(TokenScopeError, match="http2"):
        bench.ours.Client(http2=True)
    with pytest.raises(TokenScopeError, match="http2"):
        bench.ours.CancellableTransport(http2=True)
    with pytest.raises(TokenScopeError, match="'https' is not supported"):
        bench.ours.CancellableTransport(proxy="https://127.0.0.1:1")
    with pytest.raises(TokenScopeError, match="CancellableTransport"):
        bench.ours.Client(transport=bench.library.HTTPTransport())
    with pytest.raises(TokenScopeError, match="CancellableTransport"):
        bench.ours.Client(mounts={"http://": bench.library.HTTPTransport()})
    with pytest.raises(TypeError, match="token must be"):
        bench.ours.Client(token="mine")
    with pytest.raises(TypeError, match="token must be"):
        bench.ours.CancellableTransport(token=1)


def test_a_transport_of_the_users_own_is_taken_as_it_is(bench):
    """A mock for tests, as with the plain client."""
    library = bench.library
    mock = library.MockTransport(lambda request: library.Response(200, text=request.url.path))
    assert bench.ours.Client(transport=mock).get("http://x/path").text == "/path"


def test_a_server_behind_a_unix_socket_is_guarded(bench, tmp_path):
    """``uds=`` connects there, and the wait for the answer is cancellable."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        client = bench.client(transport=bench.ours.CancellableTransport(uds=path))
        token = CancellationToken()
        attempt = Attempt(lambda: client.get("http://local/"), token)
        far, _ = listener.accept()
        with far:
            assert far.recv(65536).startswith(b"GET / ")
            token.cancel()
            assert isinstance(attempt.failure(), Cancelled)
            assert far.recv(1) == b""


# --- the leak run ---------------------------------------------------------------------------------------------------

CANCELS = 2_000
WORKERS = 8
LATEST_MS = {"tcp": 12, "tls": 50}
BODY = b"x" * 3000
PATHS = {
    "/ok": play.answers(BODY),
    "/headers": play.hangs_before_headers,
    "/half": play.hangs_in_headers,
    "/length": play.hangs_in_body("content-length"),
    "/chunked": play.hangs_in_body("chunked"),
    "/close": play.hangs_in_body("until-close"),
    "/drip": play.drips,
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("fork", "transport"), [("httpx", "tcp"), ("httpx2", "tls")])
def test_random_cancels_harm_no_innocent_and_leak_nothing(make_bench, fork, transport):
    """No third outcome, no wrong answer, no harm to others; the leak fixture finds nothing left."""
    bench = make_bench(fork, transport, 30)
    peer, client = bench.peer(play.by_path(PATHS, play.answers(BODY))), bench.client()
    stop = threading.Event()
    innocents = [Attempt(lambda: _ask_until(stop, client, peer)) for _ in range(3)]
    workers = [
        Attempt(lambda seed=seed: _many_cancels(seed, client, peer, LATEST_MS[transport])) for seed in range(WORKERS)
    ]
    try:
        outcomes = [outcome for worker in workers for outcome in worker.value(150)]
    finally:
        stop.set()
    assert all(innocent.value(10) > 0 for innocent in innocents)
    assert len(outcomes) == CANCELS // WORKERS * WORKERS
    assert set(outcomes) <= {"cancelled", "answered"}
    assert outcomes.count("cancelled") > CANCELS // 2


@pytest.mark.parametrize("fork", FORKS)
def test_a_shared_tls_context_is_not_changed_under_handshakes(make_bench, fork):
    """The protocols are set for the first connection: to set them again harms a handshake on another thread."""

    class Context(ssl.SSLContext):
        changes = 0

        def set_alpn_protocols(self, protocols: list[str]) -> None:
            self.changes += 1
            super().set_alpn_protocols(protocols)

    bench = make_bench(fork, "tls", 30)
    context = Context(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(bench.authority.ca_file)
    peer, client = bench.peer(play.answers(BODY)), bench.client(verify=context)
    for _ in range(3):
        assert client.get(peer.url(), headers={"Connection": "close"}).content == BODY
    assert peer.connections == 3
    assert context.changes == 1


def _ask_until(stop: threading.Event, client: Any, peer: Peer) -> int:
    asked = 0
    while not stop.is_set():
        assert client.get(peer.url("/ok")).content == BODY
        asked += 1
    return asked


def _many_cancels(seed: int, client: Any, peer: Peer, latest_ms: int) -> list[str]:
    dice = random.Random(seed)
    return [_one_cancel(dice, client, peer, latest_ms) for _ in range(CANCELS // WORKERS)]


def _one_cancel(dice: random.Random, client: Any, peer: Peer, latest_ms: int) -> str:
    token = CancellationToken()
    path = dice.choice(list(PATHS))
    timer = threading.Timer(dice.random() * latest_ms / 1000, token.cancel, ["random"])
    timer.start()
    try:
        with use_token(token):
            body = client.get(peer.url(path)).content
    except Cancelled as error:
        return "cancelled" if error.reason is token.reason else "cancelled for another reason"
    finally:
        timer.cancel()
        timer.join()
    assert path == "/ok"
    assert body == BODY
    return "answered"
