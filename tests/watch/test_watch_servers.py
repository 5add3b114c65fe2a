"""Hang-ups of every kind, on every real server: seen where they are one, not seen where they are none."""

from __future__ import annotations

import contextlib
import json
import time
from itertools import count
from typing import TYPE_CHECKING

import pytest
from servers import KEEP_ALIVE, THREADED, serve

if TYPE_CHECKING:
    from pathlib import Path

    from servers import Server

SOURCES = {
    "gunicorn-sync": "gunicorn.socket",
    "gunicorn-gthread": "gunicorn.socket",
    "waitress": "waitress.client_disconnected",
    "werkzeug": "werkzeug.socket",
    "wsgiref": "wsgi.input",
}
# Seconds for which a request is watched that nobody leaves: a thousand times what an event takes.
QUIET = 0.2

_numbers = count()


def hang(wait: float = 8, **more: object) -> tuple[str, str]:
    """Return a request's number and its path."""
    number = str(next(_numbers))
    extra = "".join(f"&{name}={value}" for name, value in more.items())
    return number, f"/hang?id={number}&wait={wait}{extra}"


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_a_hang_up_is_seen_while_the_view_blocks(server: Server, how: str) -> None:
    """A clean close and a reset both reach the callback, and the watch says that it fired."""
    number, path = hang()
    with server.connect() as client:
        client.send("GET", path)
        assert server.expect("watching", id=number)["source"] == SOURCES[server.kind]
        client.leave(how)
    ended = server.expect("ended", id=number)
    assert (ended["gone"], ended["fired"], ended["twice"]) == (True, True, True)


def test_an_idle_client_is_left_alone(server: Server) -> None:
    """A client that waits is not taken for one that has gone, and gets its answer."""
    number, path = hang(QUIET)
    with server.connect() as client:
        client.send("GET", path)
        assert client.read_answer().body == b"answer"
    ended = server.expect("ended", id=number)
    assert (ended["gone"], ended["fired"], ended["twice"]) == (False, False, False)


def test_a_half_close_counts_as_gone_and_is_answered_all_the_same(server: Server) -> None:
    """By default a client that stops sending counts as gone; the server can still answer it."""
    number, path = hang()
    with server.connect() as client:
        client.send("GET", path)
        server.expect("watching", id=number)
        client.leave("half")
        assert server.expect("ended", id=number)["fired"]
        assert client.read_answer().body == b"answer"


def test_a_half_close_can_be_ignored(server: Server) -> None:
    """With half_close="ignore" a client that stopped sending is no hang-up ..."""
    number, path = hang(QUIET, half_close="ignore")
    with server.connect() as client:
        client.send("GET", path)
        server.expect("watching", id=number)
        client.leave("half")
        assert client.read_answer().body == b"answer"
    assert not server.expect("ended", id=number)["fired"]


def test_ignoring_half_closes_still_sees_a_reset(server: Server) -> None:
    """... while a reset still is one."""
    number, path = hang(half_close="ignore")
    with server.connect() as client:
        client.send("GET", path)
        server.expect("watching", id=number)
        client.leave("rst")
    assert server.expect("ended", id=number)["fired"]


def test_a_pipelined_request_is_no_hang_up(server: Server) -> None:
    """Bytes of a second request, sent early, are neither a hang-up ..."""
    number, path = hang(QUIET)
    with server.connect() as client:
        client.send("GET", path)
        server.expect("watching", id=number)
        client.send("GET", hang(0)[1])
        assert not server.expect("ended", id=number)["fired"]


def test_a_pipelined_request_hides_no_hang_up(server: Server) -> None:
    """... nor do they hide one."""
    number, path = hang()
    with server.connect() as client:
        client.send("GET", path)
        server.expect("watching", id=number)
        client.send("GET", hang(0)[1])
        client.leave("fin")
    assert server.expect("ended", id=number)["fired"]


def test_a_hang_up_before_the_view_began_is_seen(server: Server) -> None:
    """A client that left early is seen as soon as its request is watched."""
    number, path = hang(late=0.05)
    with server.connect() as client:
        client.send("GET", path)
        server.expect("late", id=number)
        client.leave("fin")
    assert server.expect("ended", id=number)["fired"]


def test_a_body_that_never_comes_hides_no_hang_up(server: Server) -> None:
    """A client that leaves in the middle of its upload is seen, though bytes lie unread in the socket."""
    if server.kind == "waitress":
        pytest.skip("waitress calls the app only when the body is complete")
    number, path = hang()
    with server.connect() as client:
        client.send("POST", path, {"Content-Length": "1000"}, b"x" * 500)
        server.expect("watching", id=number)
        client.leave("fin")
    assert server.expect("ended", id=number)["fired"]


def test_an_unread_body_hides_no_hang_up(server: Server) -> None:
    """A complete body that the app never reads does not hide the hang-up behind it."""
    number, path = hang()
    with server.connect() as client:
        client.send("POST", path, body=b"x" * 20_000)
        server.expect("watching", id=number)
        client.leave("fin")
    assert server.expect("ended", id=number)["fired"]


def test_the_second_request_of_a_connection_is_watched_like_the_first(server: Server) -> None:
    """Keep-alive: nothing of the first request's watch is left, and the second one sees the hang-up."""
    if server.kind not in KEEP_ALIVE:
        pytest.skip("this server closes the connection after each answer")
    first, second = hang(0), hang()
    with server.connect() as client:
        client.send("GET", first[1])
        assert client.read_answer().body == b"answer"
        assert not server.expect("ended", id=first[0])["fired"]
        client.send("GET", second[1])
        server.expect("watching", id=second[0])
        client.leave("fin")
    assert server.expect("ended", id=second[0])["fired"]


def test_the_dup_does_not_delay_the_end_of_the_connection(server: Server) -> None:
    """A client that reads until the server closes is not kept waiting by our copy of the socket."""
    _, path = hang(0)
    with server.connect() as client:
        client.send("GET", path, {"Connection": "close"})
        assert client.read_answer().body == b"answer"
        client.socket.settimeout(2)
        assert client.socket.recv(1) == b""


def test_a_fork_in_a_request_disturbs_neither_process(server: Server) -> None:
    """The child has a watcher of its own, closes only its copies; the parent still sees its client leave."""
    with server.connect() as client:
        client.send("GET", "/fork")
        child = server.expect("child")
        assert (child["seen"], child["fired"]) == (True, True)
        server.expect("forked")
        client.leave("fin")
    ended = server.expect("ended", id="fork")
    assert (ended["gone"], ended["fired"]) == (True, True)


def test_nothing_is_left_after_many_requests(server: Server) -> None:
    """Two hundred requests, half of them left by their clients: no descriptor more, one watcher thread."""
    before = json.loads(server.ask("/census").body)["fds"]
    for index in range(200):
        number, path = hang(0 if index % 2 else 5)
        with server.connect() as client:
            client.send("GET", path)
            if index % 2:
                client.read_answer()
        server.expect("ended", id=number)
    end = time.monotonic() + 5
    while True:
        held = json.loads(server.ask("/census").body)
        # werkzeug and waitress close what belongs to a finished request a moment later.
        if held["fds"] <= before + 2 or time.monotonic() > end:
            break
    assert held["fds"] <= before + 2
    assert held["threads"].count("tokenscope-watch") == 1


def test_each_hang_up_reaches_its_own_request(server: Server) -> None:
    """As many as the server runs at a time are watched together, and each hang-up reaches its own request."""
    if server.kind not in THREADED:
        pytest.skip("one request at a time")
    with contextlib.ExitStack() as stack:
        clients = {}
        for _ in range(12):
            number, path = hang()
            clients[number] = stack.enter_context(server.connect())
            clients[number].send("GET", path)
        for number in clients:
            server.expect("watching", id=number)
        leavers, stayers = list(clients)[::2], list(clients)[1::2]
        for number in leavers:
            clients[number].leave("fin")
        for number in leavers:
            assert server.expect("ended", id=number)["fired"]
        # Nobody else's watch fired: the others are still being watched.
        assert not [entry for entry in server.journal.so_far() if entry.get("id") in stayers]
        for number in stayers:
            clients[number].leave("fin")
        for number in stayers:
            assert server.expect("ended", id=number)["fired"]


@pytest.mark.parametrize("kind", ["gunicorn-gthread", "waitress"])
def test_on_a_unix_socket_a_half_close_is_told_apart(kind: str, tmp_path: Path) -> None:
    """Behind a proxy on a Unix socket a client that stops sending is not gone, and one that closes is."""
    with serve(kind, "watch/watch_app.py:make", tmp_path, unix=True) as server:
        number, path = hang(QUIET)
        with server.connect() as client:
            client.send("GET", path)
            server.expect("watching", id=number)
            client.leave("half")
            assert client.read_answer().body == b"answer"
        assert not server.expect("ended", id=number)["fired"]
        number, path = hang()
        with server.connect() as client:
            client.send("GET", path)
            server.expect("watching", id=number)
        assert server.expect("ended", id=number)["fired"]


def test_a_server_that_closes_its_descriptor_under_us_loses_nothing(tmp_path: Path) -> None:
    """A waitress that looks ahead closes a reset connection at once; our copy of it still tells."""
    with serve("waitress", "watch/watch_app.py:make", tmp_path, env={"LOOKAHEAD": "1"}) as server:
        for _ in range(10):
            number, path = hang()
            with server.connect() as client:
                client.send("GET", path)
                server.expect("watching", id=number)
                client.leave("rst")
            assert server.expect("ended", id=number)["fired"]
