"""The guard alone, on a pair of sockets: what a cancel does to a connection, and what it must not do."""

from __future__ import annotations

import gc
import os
import select
import socket
import threading
import weakref

import pytest
from peers import Attempt, blocked_in, wait_until

from tokenscope import CancellationToken, Cancelled, TaskCancelled, use_token
from tokenscope._core import timer
from tokenscope._core.current import uninterruptible
from tokenscope.net import Guard, GuardedSocket


@pytest.fixture
def pair():
    """Yield two connected TCP sockets, closed afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        far.settimeout(5)
        yield near, far


@pytest.fixture
def guarded(pair):
    """Yield a guarded socket, its guard and the far end."""
    near, far = pair
    guard = Guard(near)
    sock = GuardedSocket(near, guard)
    yield sock, guard, far
    sock.close()


def test_cancel_wakes_a_blocked_read_and_the_peer_sees_it(guarded):
    """The blocked thread comes back at once with Cancelled, and the far end reads the end."""
    sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)
    attempt = Attempt(lambda: sock.recv(10), token)
    wait_until(lambda: blocked_in(attempt.thread, "recv"))
    token.cancel("stop")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert failure.reason is token.reason
    assert far.recv(1) == b""


def test_cancel_wakes_a_blocked_write(guarded):
    """`sendall` to a peer that does not read ends with the broken pipe as the cause; the peer is reset."""
    sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)
    attempt = Attempt(lambda: sock.sendall(b"x" * 50_000_000), token)
    wait_until(lambda: guard._unsent() > 0)
    token.cancel("stop")
    failure = attempt.failure()
    assert isinstance(failure, Cancelled)
    assert isinstance(failure.__cause__, OSError)
    sock.close()
    poll = select.poll()
    poll.register(far, select.POLLHUP)
    assert poll.poll(5000)


def test_what_is_in_the_buffer_is_no_success_under_a_cancelled_token(guarded):
    """Data that arrived before the cancel is still readable in the kernel; the token decides all the same."""
    sock, guard, far = guarded
    token = CancellationToken()
    far.sendall(b"data")
    guard.attach(token)
    token.cancel("stop")
    with use_token(token), pytest.raises(Cancelled):
        sock.recv(10)


def test_own_failure_of_the_socket_is_told_as_it_is(guarded):
    """Under a live token a timeout stays a timeout, and an end an end."""
    sock, guard, far = guarded
    guard.attach(CancellationToken())
    sock.settimeout(0.01)
    with pytest.raises(TimeoutError):
        sock.recv(1)
    far.close()
    assert sock.recv(1) == b""


def test_timeout_that_was_the_tokens_deadline_is_a_cancel(guarded, monkeypatch):
    """Whoever sees the time run out cancels with `deadline` himself, be the timer ever so late."""
    monkeypatch.setattr(type(timer.timer), "add", lambda _timer, _alarm: None)
    sock, guard, _far = guarded
    token = CancellationToken(timeout=0.02)
    guard.attach(token)
    sock.settimeout(0.03)
    with use_token(token), pytest.raises(Cancelled) as caught:
        sock.recv(1)
    assert caught.value.reason.kind == "deadline"


def test_detached_connection_is_out_of_reach(guarded):
    """After `detach` a cancel comes too late, and the next token has nothing to fear from the last."""
    sock, guard, far = guarded
    first, second = CancellationToken(), CancellationToken()
    guard.attach(first)
    assert guard.detach()
    guard.attach(second)
    first.cancel("late")
    guard.wake()  # as if the first one's wake-up were late
    far.sendall(b"fine")
    assert sock.recv(10) == b"fine"
    assert guard.token is second


def test_detach_tells_that_the_connection_was_cut(guarded):
    """The pool must know: such a connection is closed, not kept."""
    _sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)
    token.cancel("stop")
    assert not guard.detach()
    assert "fired" in repr(guard)
    assert far.recv(1) == b""


def test_attach_to_a_cancelled_token_is_seen_at_the_next_look(guarded):
    """Register, then look: no wake-up comes for a cancel of the past."""
    sock, guard, far = guarded
    token = CancellationToken()
    token.cancel("before")
    guard.attach(token)
    with use_token(token), pytest.raises(Cancelled):
        sock.sendall(b"never sent")
    assert far.recv(1) == b""


def test_healthy_thread_using_a_cancelled_tasks_connection_gets_an_exception(guarded):
    """`Cancelled` is raised only in threads that are cancelled themselves."""
    sock, guard, _far = guarded
    token = CancellationToken()
    guard.attach(token)
    token.cancel("stop")
    with pytest.raises(TaskCancelled) as caught:
        sock.recv(1)
    assert caught.value.reason is token.reason


def test_descriptor_is_closed_with_the_last_holder(pair):
    """Connection and files count; in any order, and not twice."""
    near, far = pair
    guard = Guard(near)
    sock = GuardedSocket(near, guard)
    reader = sock.makefile("rb")
    sock.close()
    sock.close()
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    reader.close()
    reader.close()
    far.setblocking(True)
    assert far.recv(1) == b""
    guard.release()
    assert "closed" in repr(guard)


def test_dropped_guard_closes_its_descriptor_quietly(pair):
    """A guard that nobody released warns nobody and leaks nothing; the token does not keep it."""
    near, _far = pair
    token = CancellationToken()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    guard = Guard(near)
    guard.attach(token)
    link = weakref.ref(guard)
    del guard
    gc.collect()
    assert link() is None
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    token.cancel("nobody there")


def test_wake_inside_of_a_locked_section_is_done_after_it(guarded):
    """A signal handler may cancel while this very thread is inside the guard: no waiting for oneself."""
    _sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)
    with guard._lock:
        token.cancel("from a handler")
        assert not guard._fired
    guard.release()  # any operation that looks at the marks
    assert guard._fired
    assert far.recv(1) == b""


def test_release_inside_of_a_locked_section_is_done_after_it(pair):
    """A finalizer may release while this very thread is inside the guard."""
    near, _far = pair
    guard = Guard(near)
    with guard._lock:
        guard.release()
        assert guard._dup.fileno() >= 0
    guard.wake()
    assert guard._dup.fileno() == -1


def test_guard_of_another_process_shuts_nothing_down(guarded):
    """A forked child shares the parent's connection: its own cancel must not end that."""
    sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)
    guard._pid = -1
    assert guard.foreign
    token.cancel("in the child")
    far.sendall(b"alive")
    assert sock._sock.recv(10) == b"alive"
    with use_token(token), pytest.raises(Cancelled):
        sock.recv(1)


def test_section_that_must_not_be_cut_is_not_cut(guarded):
    """A read in an uninterruptible section ends by itself; the cancel counts from the next one on."""
    sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)

    def call() -> bytes:
        with uninterruptible():
            return sock.recv(10)

    attempt = Attempt(call, token)
    wait_until(lambda: blocked_in(attempt.thread, "recv"))
    token.cancel("stop")
    far.sendall(b"committed")
    assert attempt.value() == b"committed"
    with use_token(token), pytest.raises(Cancelled):
        sock.recv(10)
    assert far.recv(1) == b""


def test_connection_cut_before_the_section_does_not_pass_for_whole(guarded):
    """If the cancel was faster than the section, the section is told so before it sends anything."""
    sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)
    token.cancel("stop")
    with use_token(token), pytest.raises(Cancelled), uninterruptible():
        sock.sendall(b"commit")
    assert far.recv(10) == b""


def test_limit_of_the_section_itself_does_cut(guarded):
    """A token from inside of the section is its own limit."""
    sock, guard, _far = guarded
    with pytest.raises(TimeoutError), uninterruptible(0.03) as limit:
        guard.attach(limit)
        sock.recv(1)


def test_shutdown_by_the_user_works_only_while_in_use(guarded):
    """An idle connection belongs to its pool."""
    sock, guard, far = guarded
    sock.shutdown(socket.SHUT_RDWR)
    far.sendall(b"still there")
    assert sock.recv(20) == b"still there"
    guard.attach(CancellationToken())
    sock.shutdown(socket.SHUT_RD)
    assert sock.recv(1) == b""
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    sock.shutdown(socket.SHUT_RDWR)


def test_files_are_those_of_the_socket(guarded):
    """Bytes and text, for reading and for writing; a mode that makes no sense is refused."""
    sock, _guard, far = guarded
    far.sendall(b"one\ntwo\n")
    with pytest.raises(ValueError, match="'x'"):
        sock.makefile("x")
    with pytest.raises(ValueError, match="buffer"):
        sock.makefile("r", 0)
    with sock.makefile("rb") as buffered:
        assert buffered.readline() == b"one\n"
        assert buffered.fileno() == sock.fileno()
    with sock.makefile("rb", 0) as raw:
        assert raw.readable()
        assert raw.name == sock.fileno()
        assert raw._sock is sock._sock
    far.sendall(b"five\n")
    with sock.makefile("rw", encoding="ascii", newline="\n") as text:
        text.write("three\n")
        text.flush()
        assert far.recv(10) == b"three\n"
        assert text.readline() == "five\n"
    with sock.makefile("wb") as writer:
        writer.write(b"four")
    assert far.recv(10) == b"four"
    assert sock.gettimeout() is None
    assert "GuardedSocket" in repr(sock)


def test_send_and_receive_are_the_sockets_own_under_a_live_token(guarded):
    """Nothing is lost or added on the way."""
    sock, guard, far = guarded
    guard.attach(CancellationToken())
    assert sock.send(b"abc") == 3
    sock.sendall(memoryview(b"def"))
    assert far.recv(10) == b"abcdef"
    far.sendall(b"ghi")
    buffer = bytearray(10)
    assert sock.recv_into(buffer) == 3
    assert buffer[:3] == b"ghi"


def test_attach_detach_and_cancel_from_many_threads_cut_only_their_own(pair):
    """In a thousand rounds a connection dies only if its own token was cancelled before `detach`."""
    near, _far = pair
    for _ in range(1000):
        guard = Guard(near)
        token = CancellationToken()
        barrier = threading.Barrier(2)
        guard.attach(token)

        def cancel(token=token, barrier=barrier) -> None:
            barrier.wait()
            token.cancel("race")

        thread = threading.Thread(target=cancel)
        thread.start()
        barrier.wait()
        whole = guard.detach()
        thread.join()
        assert whole is not guard._fired
        guard.release()


def test_connection_of_another_process_goes_back_to_no_pool(guarded):
    """A child that detaches its parent's connection is told to close its copy, and waits for no lock."""
    _sock, guard, far = guarded
    guard.attach(CancellationToken())
    guard._pid = -1
    with guard._lock:  # as copied by a fork in the middle of a section
        assert not guard.detach()
        guard.shutdown(socket.SHUT_RDWR)
    assert guard.token is None
    far.sendall(b"alive")
    guard._pid = os.getpid()


def test_socket_without_a_send_queue_to_ask_is_shut_down_all_the_same():
    """Not every kind of socket, nor every system, tells how much has not left yet."""
    near, far = socket.socketpair()
    with near, far:
        guard, token = Guard(near), CancellationToken()
        guard.attach(token)
        token.cancel("stop")
        assert far.recv(1) == b""
        guard.release()


@pytest.mark.parametrize("answer", [None, OSError(25, "not a terminal")], ids=["no ioctl", "refused"])
def test_unsent_bytes_are_none_where_the_system_does_not_say(guarded, monkeypatch, answer):
    """Then only an upload that is running resets the connection."""

    def ioctl(*_: object) -> bytes:
        assert answer is not None
        raise answer

    monkeypatch.setattr("tokenscope.net.guard._ioctl", answer and ioctl)
    sock, guard, far = guarded
    token = CancellationToken()
    guard.attach(token)
    assert guard._unsent() == 0
    token.cancel("stop")
    assert far.recv(1) == b""
    sock.close()


def test_cancel_of_an_unconnected_socket_is_harmless():
    """There is nothing to end: the next look at the token tells."""
    with socket.socket() as sock:
        guard, token = Guard(sock), CancellationToken()
        guard.attach(token)
        token.cancel("stop")
        with use_token(token), pytest.raises(Cancelled):
            guard.check()
        guard.release()


@pytest.mark.parametrize("default", [None, 5])
@pytest.mark.parametrize("timeout", [None, 0, 5])
def test_making_guards_leaves_the_mode_of_the_socket_alone(pair, timeout, default):
    """The duplicate shares the mode with the socket, whose timeout may have changed since the first guard was made."""
    near, _far = pair
    near.settimeout(0 if timeout is None else None)
    first = Guard(near)
    near.settimeout(timeout)
    blocking = os.get_blocking(near.fileno())
    old = socket.getdefaulttimeout()
    socket.setdefaulttimeout(default)
    try:
        guards = first, Guard(near), first.twin()
    finally:
        socket.setdefaulttimeout(old)
    assert os.get_blocking(near.fileno()) is blocking
    for guard in guards:
        guard.release()
