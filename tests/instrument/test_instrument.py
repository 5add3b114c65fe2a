"""The front door for code that cannot be edited: what `instrument` turns on, says, and gives back."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
import threading
import weakref

import pytest
import requests
import urllib3
from peers import Attempt, Peer
from peers import scripts as play

import tokenscope
from tokenscope import CancellationToken, Cancelled, use_token
from tokenscope.integrations._urllib3_pool import GuardedPool

PATCHED = ("clear", "connection_from_pool_key")
ORIGINALS = {name: vars(urllib3.PoolManager)[name] for name in PATCHED}


def patched():
    return {name for name in PATCHED if vars(urllib3.PoolManager)[name] is not ORIGINALS[name]}


@pytest.fixture(autouse=True)
def _restored():
    yield
    tokenscope.uninstrument()
    assert not patched()


def assert_cancellable(fetch):
    with Peer(play.hangs_before_headers) as peer:
        token = CancellationToken()
        attempt = Attempt(lambda: fetch(peer.url()), token)
        assert peer.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)
        assert peer.requests == 1


def test_what_was_turned_on_is_reported():
    """Once as turned on, then as on already, then as turned off; each with its version."""
    versions = {"requests": requests.__version__, "urllib3": urllib3.__version__}
    first = tokenscope.instrument()
    assert (first.turned_on, first.already_on, first.not_installed) == (("requests", "urllib3"), (), ())
    assert first.versions == versions
    assert str(first) == f"turned on: requests {versions['requests']}, urllib3 {versions['urllib3']}"
    again = tokenscope.instrument("urllib3")
    assert (again.turned_on, again.already_on) == ((), ("urllib3",))
    assert tokenscope.uninstrument().turned_off == ("requests", "urllib3")
    assert str(tokenscope.uninstrument()) == "nothing to do"


def test_every_attribute_is_given_back():
    """The identity of each, and the plain behaviour of a manager that was used meanwhile."""
    with Peer(play.answers(b"hello")) as peer, urllib3.PoolManager() as manager:
        own = dict(vars(manager))
        tokenscope.instrument()
        assert patched() == set(PATCHED)
        with use_token(CancellationToken()) as token:
            assert manager.request("GET", peer.url()).data == b"hello"
            tokenscope.uninstrument()
            assert not patched()
            assert vars(manager) == own
            token.cancel("nobody listens")
            assert manager.request("GET", peer.url()).data == b"hello"


@pytest.mark.parametrize("name", ["requests", "urllib3"])
def test_one_name_may_go_while_the_other_stays(name):
    """Both names stand for the same patches, which stay until neither is wanted."""
    tokenscope.instrument()
    assert tokenscope.uninstrument(name).turned_off == (name,)
    assert patched() == set(PATCHED)
    with use_token(CancellationToken()) as token:
        token.cancel("stop")
        with pytest.raises(Cancelled):
            requests.get("http://127.0.0.1:1/", timeout=5)


def test_plain_calls_are_cancellable():
    """`requests.get`, a session and a manager that were made before, and urllib3's own functions."""
    with requests.Session() as session, urllib3.PoolManager() as manager:
        session.trust_env = False
        tokenscope.instrument()
        assert_cancellable(lambda url: requests.get(url, proxies={"http": ""}))
        assert_cancellable(session.get)
        assert_cancellable(lambda url: manager.request("GET", url, retries=3))
        assert_cancellable(lambda url: urllib3.request("GET", url))
        assert_cancellable(lambda url: urllib3.PoolManager().request("GET", url))
    urllib3._DEFAULT_POOL.clear()


def test_a_connection_made_outside_is_not_used_inside():
    """A kept-alive one has no guard: a cancel could not reach it."""
    script = play.by_path({"/hang": play.hangs_before_headers}, play.answers(b"hello"))
    with Peer(script) as peer, urllib3.PoolManager() as manager:
        tokenscope.instrument()
        assert manager.request("GET", peer.url()).data == b"hello"
        token = CancellationToken()
        attempt = Attempt(lambda: manager.request("GET", peer.url("/hang")), token)
        assert peer.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.connections == 2


def test_outside_of_any_scope_nothing_changes():
    """The same pool object of the same class, with the connection it has."""
    with Peer(play.answers(b"hello")) as peer, urllib3.PoolManager() as manager:
        before = manager.connection_from_url(peer.url())
        tokenscope.instrument()
        assert manager.connection_from_url(peer.url()) is before
        assert type(before) is urllib3.HTTPConnectionPool
        for _ in range(2):
            assert manager.request("GET", peer.url()).data == b"hello"
        assert before.num_connections == 1
        with use_token(CancellationToken()):
            for _ in range(2):
                assert manager.request("GET", peer.url()).data == b"hello"
        assert peer.connections == 2
        assert before.num_requests == 2


def test_clearing_a_manager_drops_also_the_pools_beside_it():
    """As `Session.close` does: no connection is left that nobody can reach."""
    with Peer(play.answers(b"hello")) as peer, urllib3.PoolManager() as manager:
        tokenscope.instrument()
        with use_token(CancellationToken()):
            manager.request("GET", peer.url())
            beside = weakref.ref(manager.connection_from_url(peer.url()))
        assert isinstance(beside(), GuardedPool)
        manager.clear()
        gc.collect()
        assert beside() is None


def test_a_manager_that_connects_in_a_way_of_its_own_is_left_alone(caplog):
    """It works on as a plain one, and the log says so once."""
    from urllib3 import connection, connectionpool

    class OwnConnection(connection.HTTPConnection):
        def _new_conn(self):
            return super()._new_conn()

    class OwnPool(connectionpool.HTTPConnectionPool):
        ConnectionCls = OwnConnection

    class OwnManager(urllib3.PoolManager):
        def __init__(self):
            super().__init__()
            self.pool_classes_by_scheme = {"http": OwnPool}

    tokenscope.instrument()
    with (
        caplog.at_level(logging.WARNING, "tokenscope"),
        Peer(play.answers(b"hello")) as peer,
        OwnManager() as manager,
        use_token(CancellationToken()),
    ):
        for _ in range(2):
            assert manager.request("GET", peer.url()).data == b"hello"
        assert type(manager.connection_from_url(peer.url())) is OwnPool
    assert [("OwnManager" in line, "OwnPool" in line) for line in caplog.messages] == [(True, True)]


def test_a_pool_that_is_none_of_urllib3s_is_left_alone(caplog):
    """A class that only behaves like a pool works on, and the log says once that no cancel reaches it."""

    class Lookalike:
        def __init__(self, host, port, **_options):
            self.address = host, port

    tokenscope.instrument()
    manager = urllib3.PoolManager()
    manager.pool_classes_by_scheme = {"http": Lookalike}
    with caplog.at_level(logging.WARNING, "tokenscope"), use_token(CancellationToken()):
        for _ in range(2):
            assert manager.connection_from_url("http://host:1").address == ("host", 1)
    assert ["Lookalike" in line for line in caplog.messages] == [True]


def test_what_somebody_else_patched_since_stays_and_is_told(caplog):
    """Refused in the report and in the log; theirs stays, ours below it is off."""
    tokenscope.instrument()
    ours = urllib3.PoolManager.clear

    def theirs(manager):
        ours(manager)

    urllib3.PoolManager.clear = theirs
    try:
        with caplog.at_level(logging.WARNING, "tokenscope"):
            report = tokenscope.uninstrument()
        assert report.turned_off == ("requests", "urllib3")
        assert list(report.refused) == ["urllib3.poolmanager.PoolManager.clear"]
        assert "not restored: urllib3.poolmanager.PoolManager.clear (now <function" in str(report)
        assert "RestoreRefused" in caplog.text
        assert urllib3.PoolManager.clear is theirs
    finally:
        urllib3.PoolManager.clear = ours  # as a well-behaved patcher ends; the fixture sees that ours goes then


def test_many_threads_instrument_and_uninstrument():
    """Requests go on beside them, and the last one leaves everything as it was."""
    stop = threading.Event()
    with Peer(play.answers(b"hello")) as peer, urllib3.PoolManager(maxsize=4) as manager:

        def flip():
            for _ in range(50):
                tokenscope.instrument()
                tokenscope.uninstrument()

        def ask():
            with use_token(CancellationToken()):
                while not stop.is_set():
                    assert manager.request("GET", peer.url()).data == b"hello"

        asking = [Attempt(ask) for _ in range(3)]
        flipping = [Attempt(flip) for _ in range(3)]
        for attempt in flipping:
            attempt.value(30)
        stop.set()
        for attempt in asking:
            attempt.value(30)
    assert not patched()


@pytest.mark.parametrize("call", [tokenscope.instrument, tokenscope.uninstrument])
@pytest.mark.parametrize(("name", "error"), [("request", ValueError), (3, TypeError), (None, TypeError)])
def test_an_unknown_name_is_refused_with_those_there_are(call, name, error):
    """The error names what was given and what could be; nothing was turned on."""
    with pytest.raises(error, match=f"{re.escape(repr(name))}.*; there are: requests, urllib3"):
        call("urllib3", name)
    assert not patched()


def test_a_library_that_is_not_there_is_reported():
    """No error: the same start-up code runs on machines with and without it."""
    code = """
import sys, tokenscope
sys.modules["requests"] = None  # as if it were not there
report = tokenscope.instrument()
print(report.turned_on, report.not_installed, list(report.versions))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.strip() == "('urllib3',) ('requests',) ['urllib3']", done.stderr
