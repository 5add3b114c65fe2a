"""Connecting and resolving under a token, without any HTTP."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from peers import Attempt, FullBacklog, Peer, blocked_in, wait_until
from peers import scripts as play

from tokenscope import CancellationToken, Cancelled, use_token
from tokenscope._core.token import NEVER
from tokenscope.net import GuardedSocket, connect_guarded, resolve
from tokenscope.net import resolve as resolve_function
from tokenscope.net.resolve import MAX_ABANDONED, THREAD_NAME, abandoned


@pytest.fixture
def silent_resolver(monkeypatch):
    """Make every name look-up hang until the test is over."""
    answer = threading.Event()
    known = socket.getaddrinfo

    def getaddrinfo(*question: object) -> object:
        answer.wait(30)
        return known("127.0.0.1", *question[1:])

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield answer
    answer.set()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == THREAD_NAME])
    assert abandoned() == 0


def test_connected_socket_is_guarded_and_has_its_timeout():
    """What comes back is ready for use, and a cancel ends it."""
    with Peer(play.never_answers) as peer:
        token = CancellationToken()
        sock, guard = connect_guarded(
            ("localhost", peer.port),
            token=token,
            timeout=7,
            family=socket.AF_INET,
            source_address=("127.0.0.1", 0),
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        guarded = GuardedSocket(sock, guard)
        assert sock.gettimeout() == 7
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        token.cancel("stop")
        with use_token(token), pytest.raises(Cancelled):
            guarded.recv(1)
        guarded.close()
        assert peer.closed.wait(5)


def test_connect_that_hangs_ends_with_the_token():
    """In SYN_SENT there is nobody who could answer."""
    with FullBacklog() as backlog:
        token = CancellationToken()
        attempt = Attempt(lambda: connect_guarded(("127.0.0.1", backlog.port), token=token), token)
        wait_until(lambda: backlog.connecting() == 1)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)


def test_shorter_of_timeout_and_remaining_time_ends_a_connect():
    """The timeout is a TimeoutError; the token's time is a cancel."""
    with FullBacklog() as backlog:
        with pytest.raises(TimeoutError):
            connect_guarded(("127.0.0.1", backlog.port), token=CancellationToken(timeout=30), timeout=0.02)
        token = CancellationToken(timeout=0.02)
        with use_token(token), pytest.raises(Cancelled) as caught:
            connect_guarded(("127.0.0.1", backlog.port), token=token, timeout=30)
        assert caught.value.reason.kind == "deadline"


def test_refused_connect_is_refused():
    """The socket's own error, with its number, for every address in turn."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        connect_guarded(("127.0.0.1", port), token=CancellationToken())
    with pytest.raises(OSError, match=r"."):
        connect_guarded(("localhost", port), token=CancellationToken())


def test_bad_socket_option_leaves_nothing_open():
    """A failure before the connect closes the socket (see the leak fixture)."""
    with pytest.raises(OSError, match=r"."):
        connect_guarded(("127.0.0.1", 1), token=NEVER, socket_options=[(socket.SOL_SOCKET, -1, 0)])


def test_name_without_addresses_is_an_error(monkeypatch):
    """As in the standard library."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    with pytest.raises(OSError, match="empty list"):
        connect_guarded(("localhost", 1), token=CancellationToken())


def test_next_address_is_tried(monkeypatch):
    """A name with two addresses, of which only the second answers."""
    with Peer(play.never_answers) as peer:
        dead = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1))
        live = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", peer.port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [dead, live])
        sock, guard = connect_guarded(("a-name.test", peer.port), token=CancellationToken())
        GuardedSocket(sock, guard).close()


def test_cancelled_look_up_is_abandoned_and_counted(silent_resolver):
    """The caller goes on at once; the thread is a daemon, and counted until the resolver answers."""
    token = CancellationToken()
    attempt = Attempt(lambda: resolve("a-name.test", 80, token=token), token)
    wait_until(lambda: blocked_in(attempt.thread, "_wait"))
    token.cancel("stop")
    assert isinstance(attempt.failure(), Cancelled)
    assert abandoned() == 1
    assert [t.daemon for t in threading.enumerate() if t.name == THREAD_NAME] == [True]
    silent_resolver.set()
    wait_until(lambda: abandoned() == 0)


def test_look_up_is_limited_by_the_tokens_time(silent_resolver):
    """``getaddrinfo`` knows no timeout; the token does."""
    assert not silent_resolver.is_set()
    token = CancellationToken(timeout=0.02)
    with use_token(token), pytest.raises(Cancelled) as caught:
        resolve("a-name.test", 80, token=token)
    assert caught.value.reason.kind == "deadline"


def test_abandoned_look_ups_are_capped(silent_resolver):
    """A dead resolver does not fill the process with threads: further names fail at once."""
    assert not silent_resolver.is_set()
    token = CancellationToken()
    attempts = [Attempt(lambda: resolve("a-name.test", 80, token=token), token) for _ in range(MAX_ABANDONED)]
    wait_until(lambda: sum(t.name == THREAD_NAME for t in threading.enumerate()) == MAX_ABANDONED)
    token.cancel("stop")
    assert all(isinstance(attempt.failure(), Cancelled) for attempt in attempts)
    assert abandoned() == MAX_ABANDONED
    with pytest.raises(socket.gaierror, match="abandoned"):
        resolve("another-name.test", 80, token=CancellationToken())


def test_digits_and_tokens_that_cannot_be_cancelled_need_no_thread(monkeypatch):
    """Digits are answered by the C library itself; outside of all scopes nobody waits for a cancel."""
    threads: list[str] = []
    known = socket.getaddrinfo

    def getaddrinfo(*question: object) -> object:
        threads.append(threading.current_thread().name)
        return known("127.0.0.1", *question[1:])

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    token = CancellationToken()
    for host in ("127.0.0.1", "::1", "fe80::1%lo"):
        assert resolve_function(host, 80, token=token)
    resolve("localhost", 80, token=NEVER)
    assert THREAD_NAME not in threads
    resolve("localhost", 80, token=token)
    assert threads[-1] == THREAD_NAME


def test_unknown_name_raises_the_resolvers_error():
    """In the thread that asked."""
    with pytest.raises(socket.gaierror):
        resolve("no-such-name.invalid", 80, token=CancellationToken())


def test_look_up_without_a_thread_to_spare_is_done_here(monkeypatch):
    """When the system has no thread to give, late is better than never."""

    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("tokenscope._core._primitives.start_thread", no_thread)
    assert resolve("localhost", 80, token=CancellationToken())


def test_cancelled_token_asks_nobody(monkeypatch):
    """A cancelled caller does not even start."""
    monkeypatch.setattr(socket, "getaddrinfo", None)
    token = CancellationToken()
    token.cancel("before")
    with use_token(token), pytest.raises(Cancelled):
        resolve("localhost", 80, token=token)
    assert time.monotonic() > 0
