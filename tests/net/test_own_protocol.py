"""`net.connect`, `net.guarded` and `net.select`: sockets for code that speaks a protocol of its own."""

from __future__ import annotations

import functools
import os
import select
import socket
import ssl
import threading

import pytest
from peers import Attempt, FullBacklog, Peer, authority, blocked_in, wait_until
from peers import scripts as play

from tokenscope import CancellationToken, Cancelled, TaskCancelled, ThreadScope, move_on_after, net, use_token, wait_any
from tokenscope._core.current import uninterruptible

A_LOT = b"x" * 50_000_000


@functools.cache
def client_context() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=authority().ca_file)


def listen(kind, tmp_path):
    """A listener of this kind, and its address."""
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        return listener, tmp_path / "s"
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, listener.getsockname()


@pytest.fixture(params=["tcp", "tls", "unix"])
def ends(request, tmp_path):
    """Yield what `net.connect` returned, and the plain far end of it."""
    listener, address = listen(request.param, tmp_path)
    tls = request.param == "tls"
    with listener:
        options = {"ssl_context": client_context()} if tls else {}
        attempt = Attempt(lambda: net.connect(address, **options))
        far, _ = listener.accept()
        if tls:
            far = authority().server_context.wrap_socket(far, server_side=True)
        near = attempt.value()
    far.settimeout(5)
    with near, far:
        far.sendall(b".")  # with it go the session tickets of TLS, which make the socket readable
        assert near.recv(1) == b"."
        yield near, far


def cut(call, blocked):
    """Cancel a call once it is blocked; the `Cancelled`."""
    token = CancellationToken()
    attempt = Attempt(call, token)
    wait_until(lambda: blocked(attempt.thread))
    token.cancel("stop")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert failure.reason is token.reason
    return failure


def in_function(name):
    return lambda thread: blocked_in(thread, name)


def sees_the_end(far):
    try:
        return far.recv(1) == b""
    except (ConnectionError, ssl.SSLError):  # a reset, or TLS without its goodbye; no timeout
        return True


@pytest.mark.parametrize(
    "receive",
    [
        lambda sock: sock.recv(10),
        lambda sock: sock.recv_into(bytearray(10)),
        lambda sock: sock.makefile("rb").readline(),
        lambda sock: sock.makefile().readline(),
    ],
    ids=["recv", "recv_into", "bytes file", "text file"],
)
def test_a_blocked_read_is_cut_and_the_peer_sees_it(ends, receive):
    """The token is the one that is current where the call is made; the socket was made under none."""
    near, far = ends
    cut(lambda: receive(near), in_function("call"))
    assert sees_the_end(far)


def write_for_ever(sock):
    with sock.makefile("wb", 0) as file:
        while True:
            file.write(A_LOT)


@pytest.mark.parametrize("send", [lambda sock: sock.sendall(A_LOT), write_for_ever], ids=["sendall", "file"])
def test_a_blocked_write_is_cut(ends, send):
    """The peer does not read, and all buffers are full."""
    near, _far = ends
    unwritable = lambda _thread: not select.select([], [near], [], 0)[1]  # noqa: E731 - a predicate
    cut(lambda: send(near), unwritable)


def test_a_full_exchange_is_that_of_a_plain_socket(ends):
    """Under a live token nothing is lost or added, also with files; `shutdown` ends one direction."""
    near, far = ends
    with use_token(CancellationToken()):
        near.sendall(b"one\n")
        assert far.recv(10) == b"one\n"
        far.sendall(b"two\nthree")
        with near.makefile("rwb") as file:
            assert file.readline() == b"two\n"
            file.write(b"four")
            file.flush()
            assert far.recv(10) == b"four"
            near.shutdown(socket.SHUT_WR)
            assert sees_the_end(far)


def test_a_cut_connection_is_no_end_for_others(ends):
    """After a cancel everybody else is told so, who was blocked and who comes later; never a quiet end."""
    near, _far = ends
    reader = Attempt(lambda: near.recv(10), CancellationToken())
    wait_until(lambda: blocked_in(reader.thread, "call"))
    token = CancellationToken()
    token.cancel("stop")
    with use_token(token), pytest.raises(Cancelled):
        near.sendall(b"never sent")
    for failure in (reader.failure(), Attempt(lambda: near.recv(10)).failure()):
        assert isinstance(failure, TaskCancelled)
        assert failure.reason is token.reason


def test_reader_and_writer_have_their_own_tokens(ends):
    """Two threads at a time; the end of one's token does nothing while its call has ended."""
    near, far = ends
    writing = CancellationToken()
    reader = Attempt(lambda: near.recv(10), CancellationToken())
    wait_until(lambda: blocked_in(reader.thread, "call"))
    with use_token(writing):
        near.sendall(b"question")
    assert far.recv(10) == b"question"
    writing.cancel("done writing")
    far.sendall(b"answer")
    assert reader.value() == b"answer"


def test_an_explicit_token_counts_too():
    """`token=` is added to the current one, at connect and at each call."""
    token = CancellationToken()
    with Peer(play.never_answers) as peer, net.connect(("127.0.0.1", peer.port), token=token) as near:
        reader = Attempt(lambda: near.recv(1), CancellationToken())
        wait_until(lambda: blocked_in(reader.thread, "call"))
        token.cancel("stop")
        assert isinstance(reader.failure(), Cancelled)
        assert peer.closed.wait(5)


def test_a_section_that_must_not_be_cut_is_not_cut(ends):
    """Cleanups may say goodbye to the other side."""
    near, far = ends
    token = CancellationToken()
    token.cancel("stop")
    with use_token(token), uninterruptible():
        near.sendall(b"bye")
    assert far.recv(10) == b"bye"


def test_a_connect_that_hangs_is_cut():
    """In SYN_SENT there is nobody who could answer; nothing stays open."""
    with FullBacklog() as backlog:
        cut(lambda: net.connect(("127.0.0.1", backlog.port)), lambda _thread: backlog.connecting() == 1)
        with pytest.raises(TimeoutError):
            net.connect(("127.0.0.1", backlog.port), timeout=0.02)


def test_a_unix_connect_that_hangs_is_cut(tmp_path):
    """The queue of the listener is full, and the system offers no wait for that."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        with net.connect(str(tmp_path / "s")):
            cut(lambda: net.connect(tmp_path / "s"), in_function("_start"))
            with pytest.raises(TimeoutError):
                net.connect(tmp_path / "s", timeout=0.02)


def test_a_tls_handshake_that_hangs_is_cut():
    """The server takes the connection and says nothing."""
    with Peer(play.never_answers) as peer:
        address = ("localhost", peer.port)
        cut(lambda: net.connect(address, ssl_context=client_context()), lambda _thread: peer.reached.is_set())
        assert peer.closed.wait(5)


def test_a_server_in_a_scope_ends_with_it():
    """Accept, TLS on the server's side and an echo, all in one scope; the listener is good for the next one."""
    heard = threading.Event()

    def echo(connection):
        with connection:
            connection.start_tls(authority().server_context, server_side=True)
            connection.sendall(connection.recv(100))
            heard.set()
            connection.recv(1)

    def serve(scope, listener):
        while True:
            connection, _address = listener.accept()
            scope.spawn(echo, connection)

    with net.guarded(socket.create_server(("127.0.0.1", 0))) as listener:
        for _ in range(2):
            with ThreadScope() as scope:
                scope.spawn(serve, scope, listener)
                address = ("localhost", listener.getsockname()[1])
                with net.connect(address, ssl_context=client_context()) as client:
                    client.sendall(b"hello")
                    assert client.recv(10) == b"hello"
                    assert heard.wait(5)
                    scope.cancel("enough")
            assert scope.cancelled_caught


def test_accept_has_the_times_of_the_listener():
    """None waits, 0 only looks, a number is a limit."""
    with net.guarded(socket.create_server(("127.0.0.1", 0))) as listener:
        assert listener.gettimeout() is None
        with move_on_after(0.02) as limit:
            listener.accept()
        assert limit.cancelled_caught
        listener.settimeout(0.02)
        with pytest.raises(TimeoutError):
            listener.accept()
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_modes_are_kept_where_they_matter():
    """A default timeout makes no blocking socket non-blocking; a listener never blocks whom another overtook."""
    near, far = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    socket.setdefaulttimeout(5)
    try:
        with net.guarded(near), far, net.guarded(listener):
            assert os.get_blocking(near.fileno())
            assert not os.get_blocking(listener.fileno())
    finally:
        socket.setdefaulttimeout(None)


def test_what_cannot_be_guarded_is_refused_by_name(tmp_path):
    """At the call, with the argument and its value."""
    for bad in (("host", "80"), ("host", True), ("host",), 7, b"bytes"):
        with pytest.raises(TypeError, match="address must be"):
            net.connect(bad)
    for port in (-1, 65536, 10**40):
        with pytest.raises(ValueError, match=f"port of address must be 0 to 65535, not {port}"):
            net.connect(("127.0.0.1", port))
    for options in (7, [7], [(1, 2)], "x"):
        with pytest.raises(TypeError, match="socket_options must be"):
            net.connect(("127.0.0.1", 1), socket_options=options)
    with pytest.raises(TypeError, match=r"source_address must be .* not 'here'"):
        net.connect(("127.0.0.1", 1), source_address="here")
    with pytest.raises(TypeError, match=r"ssl_context must be .* not True"):
        net.connect(("127.0.0.1", 1), ssl_context=True)
    with pytest.raises(ValueError, match="server_hostname 'x'"):
        net.connect(("127.0.0.1", 1), server_hostname="x")
    with pytest.raises(TypeError, match="sock must be"):
        net.guarded(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(ValueError, match="stream"):
        net.guarded(sock)
    with socket.socket() as sock, pytest.raises(OSError, match="not connected"):
        net.guarded(sock)


def test_a_tls_socket_of_ones_own_can_be_guarded():
    """`SSLSocket` refuses to be duplicated; its descriptor does not."""
    with Peer(play.never_answers, tls=authority()) as peer:
        plain = socket.create_connection(("localhost", peer.port))
        with net.guarded(client_context().wrap_socket(plain, server_hostname="localhost")) as near:
            cut(lambda: near.recv(1), in_function("call"))
            assert peer.closed.wait(5)


def test_select_tells_what_the_standard_librarys_tells(ends):
    """For a socket that can be read, one that can be written, one that does neither, and the end of one."""
    near, far = ends
    for lists in (([near], [near], []), ([near], [], [near]), ([], [near.fileno()], [near])):
        assert list(net.select(*lists, 0)) == list(select.select(*lists, 0))
    far.sendall(b"!")
    assert net.select([near], [near], [near], 5) == ([near], [near], [])


def test_select_is_woken_by_a_cancel_and_changes_nothing(ends):
    """The socket is as good as before."""
    near, far = ends
    cut(lambda: net.select([near], [], []), in_function("pause"))
    far.sendall(b"fine")
    assert net.select([near], [], []) == ([near], [], [])
    assert near.recv(4) == b"fine"


def test_select_refuses_what_it_cannot_wait_for():
    """Things without a descriptor, closed ones, and numbers that are none."""
    with pytest.raises(TypeError, match="'name'"):
        net.select(["name"], [], [])
    with pytest.raises(ValueError, match="closed"):
        net.select([-1], [], [])
    with pytest.raises(OSError, match="Bad file"):
        net.select([], [999_999], [], 5)
    with pytest.raises(ValueError, match="timeout"):
        net.select([], [], [], -1)


@pytest.mark.parametrize(
    "wait", [lambda sock: wait_any(sock, timeout=5), lambda sock: net.select([sock], [], [], 5)[0]]
)
def test_decrypted_bytes_of_a_real_tls_socket_are_ready(wait):
    """One record is read from the wire as a whole: what is left of it no ``poll`` can see."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        attempt = Attempt(lambda: net.connect(("localhost", listener.getsockname()[1]), ssl_context=client_context()))
        plain, _ = listener.accept()
        with authority().server_context.wrap_socket(plain, server_side=True) as far, attempt.value() as near:
            far.sendall(b"0123456789")
            assert wait(near) == [near]
            assert near.recv(1) == b"0"
            assert near.pending() == 9
            assert wait(near) == [near]
            assert near.recv(20) == b"123456789"
            assert wait_any(near, timeout=0) == []
