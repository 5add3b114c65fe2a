"""The doors: `Session`, `mount`, `instrument`; whose token counts; what is left alone."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import requests
from peers import Attempt, Peer, blocked_in, wait_until
from peers import scripts as play
from requests.adapters import HTTPAdapter

from tokenscope import (
    CancellationToken,
    Cancelled,
    DeadlineExceeded,
    ThreadScope,
    TokenScopeError,
    fail_after,
    move_on_after,
    use_token,
)
from tokenscope._core.current import uninterruptible
from tokenscope.integrations.requests import CancellableAdapter, Session, instrument, mount, uninstrument
from tokenscope.integrations.urllib3 import is_guarded


@contextmanager
def plain_session(*, guarded: bool = False):
    with Session() if guarded else requests.Session() as session:
        session.trust_env = False
        yield session


@pytest.fixture
def instrumented():
    """Instrument every session of the process, for one test."""
    instrument()
    yield
    uninstrument()


def assert_cancellable(get, peer: Peer) -> None:
    token = CancellationToken()
    attempt = Attempt(lambda: get(peer.url()), token)
    assert peer.reached.wait(5)
    token.cancel("stop")
    assert isinstance(attempt.failure(), Cancelled)
    assert peer.closed.wait(5)


# --- whose token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["the session's", "the current"])
def test_both_the_sessions_token_and_the_current_one_end_a_request(which):
    """An explicit token is added to the current one, never put in its place."""
    own, current = CancellationToken(), CancellationToken()
    with Peer(play.hangs_in_body("sse")) as peer, Session(token=own) as session:
        session.trust_env = False
        attempt = Attempt(lambda: list(session.get(peer.url(), stream=True).iter_lines()), current)
        assert peer.reached.wait(5)
        wait_until(lambda: blocked_in(attempt.thread, "readinto"))
        cancelled = own if which == "the session's" else current
        cancelled.cancel("stop")
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        assert failure.reason is cancelled.reason
        assert peer.closed.wait(5)


def test_sessions_token_works_outside_of_any_scope():
    """A thread without a token of its own is ended by the session's, also while it reads a stream."""
    own = CancellationToken()
    with Peer(play.hangs_in_body("sse")) as peer, Session(token=own) as session:
        session.trust_env = False
        attempt = Attempt(lambda: list(session.get(peer.url(), stream=True).iter_lines()))
        assert peer.reached.wait(5)
        own.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        with pytest.raises(Cancelled):
            session.get(peer.url())
        assert peer.requests == 1


def test_request_outside_of_any_scope_is_an_ordinary_request():
    """With no token anywhere nothing is different, failures included."""
    with Peer(play.answers(b"plain")) as peer, plain_session(guarded=True) as session:
        assert session.get(peer.url()).text == "plain"
        url = peer.url()
    with plain_session(guarded=True) as session, pytest.raises(requests.ConnectionError):
        session.get(url)


@pytest.mark.parametrize(
    "host", ["no-such-name.invalid", f"{'a' * 70}.test", "127.0.0.1:1"], ids=["unknown", "bad", "refused"]
)
def test_errors_of_a_healthy_request_are_those_of_plain_requests(host):
    """Unknown names, bad names and refusals come out as the classes that users catch."""

    def fails(session: requests.Session) -> type[BaseException]:
        with pytest.raises(Exception, match=r".") as caught:
            session.get(f"http://{host}/")
        return type(caught.value)

    with plain_session() as plain, plain_session(guarded=True) as session:
        expected = fails(plain)
        assert fails(session) is expected
        with use_token(CancellationToken(timeout=30)):
            assert fails(session) is expected


def test_read_timeout_of_a_healthy_request_is_requests_own():
    """`timeout=` still limits each wait."""
    with Peer(play.hangs_before_headers) as peer, plain_session(guarded=True) as session:
        with use_token(CancellationToken(timeout=30)), pytest.raises(requests.ReadTimeout):
            session.get(peer.url(), timeout=0.05)


def test_connect_timeout_of_a_healthy_request_is_requests_own():
    """`timeout=` still limits the connect alone."""
    from peers import FullBacklog

    with FullBacklog() as backlog, plain_session(guarded=True) as session:
        with use_token(CancellationToken(timeout=30)), pytest.raises(requests.ConnectTimeout):
            session.get(backlog.url(), timeout=0.05)


def test_response_opened_in_a_child_and_read_by_the_body_ends_with_the_scope():
    """The child has ended; its response still belongs to the scope's tree until it is closed."""
    with Peer(play.hangs_in_body("sse")) as peer, plain_session(guarded=True) as session:
        reading = threading.Event()

        def body() -> ThreadScope:
            with ThreadScope() as scope:
                scopes.append(scope)
                response = scope.spawn(lambda: session.get(peer.url(), stream=True)).result()
                reading.set()
                list(response.iter_lines())
            return scope

        scopes: list[ThreadScope] = []
        attempt = Attempt(body)
        assert reading.wait(5)
        wait_until(lambda: blocked_in(attempt.thread, "readinto"))
        scopes[0].cancel("stop")
        assert attempt.value().cancelled_caught
        assert peer.closed.wait(5)


def test_deadline_counts_the_whole_request_and_not_each_part():
    """Three redirects of 60 ms each do not fit into 100 ms, though each would."""

    def slow_redirect(exchange) -> None:
        exchange.read_request()
        exchange.pause(0.06)
        exchange.send(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n")

    with Peer(slow_redirect) as peer, plain_session(guarded=True) as session:
        with pytest.raises(DeadlineExceeded), fail_after(0.1):
            session.get(peer.url(), timeout=5)
        assert 1 <= peer.requests <= 2


def test_drip_that_never_times_out_ends_at_the_deadline():
    """A byte every two milliseconds defeats `timeout=`; the token's time includes the body."""
    with Peer(play.drips) as peer, plain_session(guarded=True) as session:
        with move_on_after(0.1) as token:
            session.get(peer.url(), timeout=5)
        assert token.cancelled_caught
        assert peer.closed.wait(5)


# --- sections that must not be cut --------------------------------------------------------------------------


def test_cleanup_may_send_requests_although_its_owner_is_cancelled():
    """An uninterruptible section leaves the session's and the outer token aside, not its own limit."""
    own = CancellationToken()
    with Peer(play.by_path({"/hang": play.hangs_before_headers}, play.answers(b"undone"))) as peer:
        with Session(token=own) as session, use_token(own):
            session.trust_env = False
            own.cancel("stop")
            with uninterruptible():
                assert session.get(peer.url("/undo")).text == "undone"
            with pytest.raises(DeadlineExceeded), uninterruptible(0.05):
                session.get(peer.url("/hang"))


def test_cancel_waits_for_a_read_that_must_not_be_cut():
    """In an uninterruptible section a response of the cancelled owner can be read to its end."""
    go_on, token = threading.Event(), CancellationToken()

    def in_two_parts(exchange) -> None:
        exchange.read_request()
        exchange.send(play.OK, b"Content-Length: 10\r\n\r\n", b"first")
        exchange.peer.reached.set()
        assert go_on.wait(5)
        exchange.send(b"after")

    with Peer(in_two_parts) as peer, plain_session(guarded=True) as session:

        def call() -> bytes:
            response = session.get(peer.url(), stream=True)
            with uninterruptible():
                body: bytes = response.raw.read()
            return body

        attempt = Attempt(call, token)
        assert peer.reached.wait(5)
        wait_until(lambda: blocked_in(attempt.thread, "readinto") and blocked_in(attempt.thread, "read"))
        token.cancel("stop")
        go_on.set()
        assert attempt.value() == b"firstafter"


# --- doors --------------------------------------------------------------------------------------------------


def test_mount_makes_an_existing_session_cancellable():
    """Its adapters and their settings stay; idle connections of the old pools are closed."""

    class Adapter(HTTPAdapter):
        """Somebody's own."""

    with (
        Peer(play.by_path({"/hang": play.hangs_before_headers}, play.answers())) as peer,
        plain_session() as session,
    ):
        adapter = Adapter(pool_maxsize=3)
        session.mount("http://", adapter)
        assert session.get(peer.url()).text == "hello"
        mount(session)
        assert session.get_adapter(peer.url()) is adapter
        assert_cancellable(lambda url: session.get(url + "hang"), peer)
        assert session.get(peer.url()).text == "hello"


def test_mount_reaches_proxies_too():
    """Proxy managers are made on demand, and are cancellable from the first request."""
    with Peer(play.hangs_after_connect) as proxy, plain_session() as session:
        mount(session)
        session.proxies = {"https": proxy.url()}
        token = CancellationToken()
        attempt = Attempt(lambda: session.get("https://127.0.0.1:1/"), token)
        assert proxy.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert proxy.closed.wait(5)


def test_instrument_reaches_sessions_made_before_and_after_it(instrumented):
    """Also the one-off session inside of `requests.get`."""
    assert instrumented is None
    with Peer(play.hangs_before_headers) as peer:
        assert_cancellable(lambda url: requests.get(url, proxies={"http": ""}), peer)
    with Peer(play.hangs_before_headers) as peer, plain_session() as session:
        assert_cancellable(session.get, peer)


def test_uninstrument_gives_everything_back():
    """Requests are plain again, also those of a session that was used meanwhile; what was mounted by hand stays."""
    with Peer(play.answers()) as peer, plain_session() as touched, plain_session() as mounted:
        mount(mounted)
        instrument()
        instrument()  # idempotent
        with use_token(CancellationToken()) as token:
            touched.get(peer.url())
            uninstrument()
            uninstrument()
            token.cancel("nobody listens")
            assert touched.get(peer.url()).text == "hello"
            with pytest.raises(Cancelled):
                mounted.get(peer.url())


def test_a_mocked_send_is_called_as_without_us(instrumented):
    """Nothing of requests is patched: what others put in place of `HTTPAdapter.send` answers, with its arguments."""
    assert instrumented is None
    answer = requests.Response()
    answer.status_code = 418
    with Peer(play.answers()) as peer, plain_session() as session:
        with mock.patch("requests.adapters.HTTPAdapter.send", return_value=answer) as mocked:
            with use_token(CancellationToken()):
                assert session.get(peer.url()).status_code == 418
            assert isinstance(mocked.call_args.args[0], requests.PreparedRequest)
        assert peer.requests == 0
    assert HTTPAdapter.send.__module__ == "requests.adapters"


@pytest.mark.parametrize("token", ["x", 3, CancellationToken], ids=["text", "number", "class"])
@pytest.mark.parametrize("door", [Session, CancellableAdapter])
def test_what_is_no_token_is_refused_when_it_is_given(door, token):
    """And not with the first request: the error names the argument and what was given."""
    with pytest.raises(TypeError, match=f"token must be a CancellationToken or None, not {re.escape(repr(token))}"):
        door(token=token)


@pytest.mark.parametrize("thing", [3, None, requests.Session])
def test_what_is_no_session_cannot_be_mounted(thing):
    """The error names the argument and what was given."""
    with pytest.raises(TypeError, match=f"session must be a requests.Session, not {re.escape(repr(thing))}"):
        mount(thing)


def test_socks_is_refused_by_a_session_and_left_alone_by_mount(monkeypatch):
    """A connection that connects in a way of its own cannot be reached: said openly, or not touched."""
    from urllib3 import connection, connectionpool, poolmanager

    class OwnConnection(connection.HTTPConnection):
        def _new_conn(self):
            raise AssertionError("never called")

    class OwnPool(connectionpool.HTTPConnectionPool):
        ConnectionCls = OwnConnection

    class OwnManager(poolmanager.PoolManager):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__()
            self.pool_classes_by_scheme = {"http": OwnPool, "https": OwnPool}

    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", OwnManager)
    adapter = CancellableAdapter()
    with pytest.raises(TokenScopeError, match="SOCKS"):
        adapter.proxy_manager_for("socks5://127.0.0.1:1080")
    with plain_session() as session:
        mount(session)
        manager = session.get_adapter("http://").proxy_manager_for("socks5://127.0.0.1:1080")
        assert manager.pool_classes_by_scheme["http"] is OwnPool


def test_pool_classes_of_others_are_derived_from():
    """A manager with pools of its own keeps them, and gets the guards on top."""
    from urllib3 import connectionpool

    class TheirPool(connectionpool.HTTPConnectionPool):
        """Somebody's own."""

    with (
        Peer(play.by_path({"/hang": play.hangs_before_headers}, play.answers())) as peer,
        plain_session() as session,
    ):
        manager = session.get_adapter("http://").poolmanager
        manager.pool_classes_by_scheme = {**manager.pool_classes_by_scheme, "http": TheirPool}
        mount(session)
        mount(session)  # idempotent
        assert issubclass(manager.pool_classes_by_scheme["http"], TheirPool)
        assert_cancellable(lambda url: session.get(url + "hang"), peer)


# --- processes ----------------------------------------------------------------------------------------------

STREAM = """
import sys, requests
from tokenscope.integrations.requests import Session
session = Session()
session.trust_env = False
response = session.get(sys.argv[1], stream=True)
try:
    print("reading", flush=True)
    for line in response.iter_lines():
        pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""

FORK = """
import os, sys
from tokenscope import CancellationToken, Cancelled, use_token
from tokenscope.integrations.requests import Session
session = Session()
session.trust_env = False
token = CancellationToken()
with use_token(token):
    response = session.get(sys.argv[1] + "parts", stream=True)
    session.get(sys.argv[1])
if os.fork() == 0:
    token.cancel("in the child only")
    fresh = session.get(sys.argv[1]).text == "hello"  # not on the parent's idle connection
    try:
        response.raw.read()
    except BaseException as error:
        os._exit(7 if fresh and "child" in str(error) else 1)
    os._exit(2)
_, status = os.wait()
print(os.waitstatus_to_exitcode(status), flush=True)
session.get(sys.argv[1] + "go-on")
print(response.text, flush=True)
"""


def run_program(source: str, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_ctrl_c_in_a_blocked_stream_closes_it_and_comes_out():
    """A real SIGINT to a real process: KeyboardInterrupt leaves the read, the server sees the close."""
    with Peer(play.hangs_in_body("sse")) as peer, run_program(STREAM, peer.url()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        assert peer.reached.wait(5)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
        assert output == "interrupted\n", errors
        assert peer.closed.wait(5)


def test_fork_shares_no_connection_and_cuts_none():
    """A child neither uses the parent's idle connections nor shuts down those that are in use."""
    go_on = threading.Event()

    def parts(exchange) -> None:
        exchange.read_request()
        exchange.send(play.OK, b"Content-Length: 10\r\n\r\n", b"first")
        assert go_on.wait(20)
        exchange.send(b"after")

    def release(exchange) -> None:
        go_on.set()
        play.answers()(exchange)

    script = play.by_path({"/parts": parts, "/go-on": release}, play.answers())
    with Peer(script) as peer, run_program(FORK, peer.url()) as process:
        try:
            output, errors = process.communicate(timeout=20)
        finally:
            go_on.set()
        assert output == "7\nfirstafter\n", errors
        assert peer.connections == 3


# --- adapters of the user's, on our session -----------------------------------------------------------------


class OwnAdapter(HTTPAdapter):
    """What a user derives from requests' adapter."""


ADAPTERS = {
    "plain": HTTPAdapter,
    "retries and pool size": lambda: HTTPAdapter(max_retries=3, pool_maxsize=2),
    "subclass": OwnAdapter,
}


@pytest.mark.parametrize("which", ["the session's", "the current"])
@pytest.mark.parametrize("make", ADAPTERS.values(), ids=ADAPTERS)
def test_adapter_mounted_on_our_session_is_cancellable(make, which):
    """Whoever mounts an adapter of their own on a `Session` keeps cancellation, and the session's token."""
    own, current = CancellationToken(), CancellationToken()
    with Peer(play.hangs_in_body("sse")) as peer, Session(token=own) as session:
        session.trust_env = False
        session.mount("http://", make())
        attempt = Attempt(lambda: list(session.get(peer.url(), stream=True).iter_lines()), current)
        assert peer.reached.wait(5)
        cancelled = own if which == "the session's" else current
        cancelled.cancel("stop")
        failure = attempt.failure()
        assert isinstance(failure, Cancelled)
        assert failure.reason is cancelled.reason
        assert peer.closed.wait(5)


@pytest.mark.parametrize("again", [copy.copy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copied", "pickled"])
def test_our_session_with_a_plain_adapter_stays_cancellable(again):
    """A copy of a `Session` makes new pools, and they are cancellable."""
    with Session() as original:
        original.mount("http://", HTTPAdapter())
        with again(original) as session, Peer(play.hangs_in_body("sse")) as peer:
            session.trust_env = False
            assert_cancellable(session.get, peer)


def test_pickled_session_of_somebody_else_has_to_be_mounted_again():
    """`mount` changes the pools of a session, and those are not pickled."""
    with plain_session() as session:
        mount(session)
        with pickle.loads(pickle.dumps(session)) as other:
            assert not is_guarded(other.get_adapter("http://").poolmanager)
            mount(other)
            assert is_guarded(other.get_adapter("http://").poolmanager)


@pytest.mark.parametrize("base", [requests.adapters.BaseAdapter, HTTPAdapter])
def test_adapter_of_another_kind_is_taken_as_it_is(base):
    """What is no `HTTPAdapter`, or is one without pools, is mounted untouched."""

    class Canned(base):
        def __init__(self) -> None:
            """Have no pools."""

        def close(self) -> None:
            """Nothing is open."""

    with Session() as session:
        adapter = Canned()
        session.mount("canned://", adapter)
        assert session.get_adapter("canned://x") is adapter
