"""The watcher by itself, on socket pairs and loopback connections of the test's own."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from tokenscope._core import events
from tokenscope.watch import CannotWatch, Connection, _watcher, find_connection, supported, watch

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 5.0
# Seconds in which something that must not happen would long have happened.
QUIET = 0.1


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A server's and a client's end of one loopback connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=PATIENCE)
        with client, listener.accept()[0] as server:
            yield server, client


@contextlib.contextmanager
def unix_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The same over AF_UNIX."""
    server, client = socket.socketpair()
    with server, client:
        yield server, client


def connection(server: socket.socket) -> Connection:
    """The connection as a server that we do not know would show it."""
    found = find_connection({"tokenscope.connection_fd": server})
    assert found is not None
    return found


def reset(client: socket.socket) -> None:
    """Leave without a goodbye."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
@pytest.mark.parametrize("half_close", ["cancel", "ignore"])
def test_a_half_close_on_a_unix_socket_is_never_taken_for_a_close(pair: object, half_close: str) -> None:
    """On AF_UNIX a half close fires under neither policy; on TCP it fires under "cancel" only."""
    with pair() as (server, client):
        gone = threading.Event()
        watched = watch(connection(server), gone.set, half_close=half_close)
        client.shutdown(socket.SHUT_WR)
        expected = pair is tcp_pair and half_close == "cancel"
        assert gone.wait(PATIENCE if expected else QUIET) is expected
        assert watched.close() is expected


@pytest.mark.parametrize("half_close", ["cancel", "ignore"])
def test_a_close_on_a_unix_socket_is_seen_under_both_policies(half_close: str) -> None:
    """Requiring HUP loses nothing on AF_UNIX."""
    with unix_pair() as (server, client):
        gone = threading.Event()
        watched = watch(connection(server), gone.set, half_close=half_close)
        client.close()
        assert gone.wait(PATIENCE)
        assert watched.close()


def test_ignoring_half_closes_sees_the_reset_that_the_first_write_brings() -> None:
    """Under "ignore" a client that closed is seen once the server writes to it: it answers with a reset."""
    with tcp_pair() as (server, client):
        gone = threading.Event()
        watched = watch(connection(server), gone.set, half_close="ignore")
        client.close()
        assert not gone.wait(QUIET)
        server.send(b"a chunk")
        assert gone.wait(PATIENCE)
        assert watched.close()


def test_a_half_close_that_does_not_count_does_not_spin() -> None:
    """The watcher sleeps on beside a half-closed connection: it makes no system call at all."""
    with tcp_pair() as (server, client):
        watched = watch(connection(server), lambda: None, half_close="ignore")
        with pytest.MonkeyPatch.context() as patch:
            looks = []
            patch.setattr(_watcher.Watcher, "look", lambda *args: looks.append(args))
            client.shutdown(socket.SHUT_WR)
            threading.Event().wait(QUIET)
            assert not looks
        watched.close()


def test_unread_bytes_do_not_hide_the_end() -> None:
    """Neither bytes that nobody read, nor their arriving, are confused with the client's leaving."""
    with tcp_pair() as (server, client):
        gone = threading.Event()
        watched = watch(connection(server), gone.set)
        client.sendall(b"x" * 10_000)
        assert not gone.wait(QUIET)
        client.close()
        assert gone.wait(PATIENCE)
        assert watched.close()


def test_a_client_that_left_before_is_told_like_any_other() -> None:
    """Registering after the hang-up loses nothing."""
    with tcp_pair() as (server, client):
        client.close()
        gone = threading.Event()
        watched = watch(connection(server), gone.set)
        assert gone.wait(PATIENCE)
        assert watched.close()


def test_look_tells_on_the_callers_thread() -> None:
    """Whoever cannot wait for the watcher looks himself; the callback comes once, from whoever saw it first."""
    with tcp_pair() as (server, client):
        told: queue.SimpleQueue[str] = queue.SimpleQueue()
        watched = watch(connection(server), lambda: told.put(threading.current_thread().name))
        assert not watched.look()
        reset(client)
        while not watched.look():
            pass
        assert watched.close()
        assert told.get(timeout=PATIENCE) in {threading.current_thread().name, _watcher.THREAD_NAME}
        assert told.empty()


def test_close_ends_it_and_says_that_nothing_happened() -> None:
    """After close() said False the callback never comes, and the descriptor is given back at once."""
    with tcp_pair() as (server, client):
        gone = threading.Event()
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        watched = watch(connection(server), gone.set)
        assert watched.close() is False
        assert watched.close() is False
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208
        client.close()
        assert not gone.wait(QUIET)


def test_an_event_for_a_reused_descriptor_fires_nothing() -> None:
    """An event that was under way when its number went to a healthy connection is dropped."""
    with tcp_pair() as (server, client):
        gone = threading.Event()
        watched = watch(connection(server), gone.set)
        _watcher.watcher.look(watched.dup)  # what the thread does with an event for this number
        assert not gone.is_set()
        client.close()  # and it is still armed
        assert gone.wait(PATIENCE)
        assert watched.close()


def test_no_healthy_connection_is_cancelled_in_a_race_for_descriptors() -> None:
    """Clients leave while their watches are closed and the numbers go to others: only leavers are told."""
    wrong: list[int] = []

    def healthy(stop: threading.Event) -> None:
        with tcp_pair() as (server, _):
            here = connection(server)
            while not stop.is_set():
                if watch(here, lambda: wrong.append(1)).close():
                    wrong.append(2)

    def leaving(stop: threading.Event) -> None:
        while not stop.is_set():
            with unix_pair() as (server, client):
                watched = watch(connection(server), lambda: None)
                client.close()
                watched.close()

    stop = threading.Event()
    threads = [threading.Thread(target=f, args=(stop,)) for f in (healthy, healthy, leaving, leaving)]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong


def test_exactly_one_of_hang_up_and_close_wins() -> None:
    """Whatever the timing: the callback came if and only if close() says that it fired."""
    for _ in range(300):
        with unix_pair() as (server, client):
            told = threading.Event()
            watched = watch(connection(server), told.set)
            leaver = threading.Thread(target=client.close)
            leaver.start()
            if watched.close():
                assert told.wait(PATIENCE)
            else:
                leaver.join(PATIENCE)
                assert not told.is_set()
            leaver.join(PATIENCE)


def test_a_raising_callback_ends_nothing_and_is_told() -> None:
    """The watcher outlives any callback, and says what it raised."""
    failures: list[events.CallbackFailed] = []
    told = threading.Event()

    def hear(event: events.CallbackFailed) -> None:
        failures.append(event)
        told.set()

    unsubscribe = events.subscribe(hear, events.CallbackFailed)
    try:
        with tcp_pair() as (server, client), tcp_pair() as (other, second):

            def fail() -> None:
                raise SystemExit("from a callback")

            first, gone = watch(connection(server), fail), threading.Event()
            client.close()
            assert told.wait(PATIENCE)
            assert [str(event.error) for event in failures] == ["from a callback"]
            watched = watch(connection(other), gone.set)
            second.close()
            assert gone.wait(PATIENCE)
            assert first.close()
            assert watched.close()
    finally:
        unsubscribe()


def test_where_there_is_no_epoll_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without epoll (macOS, Windows, gevent's patching) watching is refused in words, never guessed at."""
    monkeypatch.delattr(select, "epoll")
    assert not supported()
    with tcp_pair() as (server, _), pytest.raises(CannotWatch, match="no epoll"):
        watch(connection(server), lambda: None)


def test_a_connection_that_the_server_has_closed_is_not_watched() -> None:
    """A number that was given back may belong to a stranger: it is not watched."""
    with tcp_pair() as (server, _):
        here = connection(server)
    with pytest.raises(CannotWatch, match="cannot be watched"):
        watch(here, lambda: None)


def test_a_number_that_went_to_a_stranger_is_not_watched() -> None:
    """The server closes its socket between our look and our dup, and the number is reused at once."""
    with tcp_pair() as (server, _), tcp_pair() as (stranger, _):
        here = connection(server)
        number = server.detach()
        os.dup2(stranger.fileno(), number)
        try:
            with pytest.raises(CannotWatch, match="has closed"):
                watch(here, lambda: None)
        finally:
            os.close(number)


def test_without_a_thread_to_spare_it_says_so_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the watcher's thread cannot start, the copy of the socket is closed; the next watch starts it."""
    fresh = _watcher.Watcher()
    monkeypatch.setattr(_watcher, "watcher", fresh)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with tcp_pair() as (server, client):
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_watcher._primitives, "start_thread", refuse)
            with pytest.raises(CannotWatch, match="new thread"):
                watch(connection(server), lambda: None)
        assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208 - its epoll
        lost = lose_its_epoll(fresh, server, client)
        assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
    assert lost


def test_an_epoll_that_was_closed_under_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that closes all its descriptors loses the watcher; that is told, and the next watch works."""
    fresh = _watcher.Watcher()
    monkeypatch.setattr(_watcher, "watcher", fresh)
    for _ in range(2):
        with tcp_pair() as (server, client):
            assert lose_its_epoll(fresh, server, client)


def lose_its_epoll(watcher: _watcher.Watcher, server: socket.socket, client: socket.socket) -> bool:
    """Watch a client leave, close the epoll in the callback, and wait until the thread has told its end."""
    told = threading.Event()
    unsubscribe = events.subscribe(lambda _: told.set(), events.ThreadFailed)
    try:
        watched = watch(connection(server), lambda: watcher._epoll.close())  # noqa: PLW0108 - not there yet
        client.close()
        return told.wait(PATIENCE) and watched.close()
    finally:
        unsubscribe()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"half_close": "maybe"}, ValueError, "half_close must be 'cancel' or 'ignore', not 'maybe'"),
        ({"on_gone": None}, TypeError, "on_gone must be callable, not None"),
        ({"connection": 7}, TypeError, r"connection must be what find_connection\(\) found, not 7"),
    ],
)
def test_bad_arguments_are_refused_in_words(change: dict, error: type[Exception], words: str) -> None:
    """A wrong policy, a callback and a connection that are none are told at the call."""
    with tcp_pair() as (server, _), pytest.raises(error, match=words):
        watch(**{"connection": connection(server), "on_gone": print, **change})


def test_a_forked_child_has_a_watcher_of_its_own() -> None:
    """Fork while four threads register and close: the child's watch works, the parent's goes on."""
    stop = threading.Event()

    def churn() -> None:
        with unix_pair() as (server, _):
            here = connection(server)
            while not stop.is_set():
                watch(here, lambda: None).close()

    threads = [threading.Thread(target=churn) for _ in range(4)]
    with tcp_pair() as (server, client):
        gone = threading.Event()
        watched = watch(connection(server), gone.set)
        for thread in threads:
            thread.start()
        try:
            codes = [_forked(watched) for _ in range(30)]
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert codes == [0] * 30
        assert not gone.is_set()
        client.close()
        assert gone.wait(PATIENCE)
        assert watched.close()


def _forked(inherited: _watcher.Watch) -> int:
    """Fork; the child's exit code is 0 if watching works in it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: forking with threads is what is tested
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        with unix_pair() as (server, client):
            seen = threading.Event()
            watched = watch(connection(server), seen.set)
            client.close()
            worked = seen.wait(PATIENCE) and watched.close()
            code = 0 if worked and not inherited.close() else 2
    finally:
        os._exit(code)
