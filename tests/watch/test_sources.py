"""Finding the client's socket in an environ, without a server. With servers: `test_watch_servers.py`."""

from __future__ import annotations

import io
import socket
import tempfile
from typing import TYPE_CHECKING, Any

import pytest

from tokenscope.watch import SOURCES, NotASocket, find_connection

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    """A connected socket."""
    mine, other = socket.socketpair()
    with mine, other:
        yield mine


class Channel:
    """Shaped like waitress's channel."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.socket = sock

    def check_client_disconnected(self) -> bool:
        return False


def test_each_row_of_the_table_finds_its_server(sock: socket.socket) -> None:
    """Every source finds the socket where its server puts it, and says that it was the one."""
    holders: dict[str, Any] = {
        "gunicorn.socket": sock,
        "werkzeug.socket": sock,
        "waitress.client_disconnected": Channel(sock).check_client_disconnected,
        "wsgi.input": sock.makefile("rb"),
    }
    assert [source.name for source in SOURCES] == list(holders)
    for name, holder in holders.items():
        found = find_connection({name: holder})
        assert found is not None
        assert (found.source, found.fd, found.family) == (name, sock.fileno(), socket.AF_UNIX)
    holders["wsgi.input"].close()


def test_the_explicit_key_wins(sock: socket.socket) -> None:
    """A server that we do not know puts its descriptor (or socket) into one key, and that one is used."""
    mine, other = socket.socketpair()
    with mine, other:
        for holder in (sock.fileno(), sock):
            found = find_connection({"tokenscope.connection_fd": holder, "gunicorn.socket": mine})
            assert found is not None
            assert (found.source, found.fd) == ("tokenscope.connection_fd", sock.fileno())


def test_a_wrong_explicit_key_is_an_error_not_a_fallback(sock: socket.socket) -> None:
    """What was said explicitly and is wrong is told, instead of watching something else."""
    with tempfile.TemporaryFile() as file:
        for wrong in (-1, True, "7", file, file.fileno(), 10_000, 10**40):
            with pytest.raises(NotASocket, match="connection_fd"):
                find_connection({"tokenscope.connection_fd": wrong, "gunicorn.socket": sock})


def test_only_real_sockets_are_accepted() -> None:
    """A file, a buffer, a closed socket, a stand-in: none of them is taken for the client's connection."""
    closed, other = socket.socketpair()
    closed.close()
    other.close()
    with tempfile.TemporaryFile() as file:
        for thing in (io.BytesIO(), file, closed, object(), None):
            assert find_connection({"wsgi.input": thing, "gunicorn.socket": thing}) is None
    assert find_connection({"waitress.client_disconnected": Channel(None).check_client_disconnected}) is None
    assert find_connection({}) is None


def test_looking_does_not_change_the_socket(sock: socket.socket) -> None:
    """A bare descriptor stays blocking even if the process has a default timeout for new sockets."""
    old = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        with sock.makefile("rb") as stream:
            assert find_connection({"wsgi.input": stream}) is not None
        assert sock.getblocking()
        import os

        assert os.get_blocking(sock.fileno())
    finally:
        socket.setdefaulttimeout(old)
