"""Traps that were fallen into once: each test fails without the line that avoids it."""

from __future__ import annotations

import gc
import pickle
import threading
from typing import TYPE_CHECKING

import pytest
import urllib3
from peers import Attempt, Peer, blocked_in, wait_until
from peers import scripts as play
from urllib3.util import Retry

from tokenscope import CancellationToken, Cancelled, TaskCancelled, use_token
from tokenscope.integrations.requests import CancellableAdapter, Session

if TYPE_CHECKING:
    import requests


@pytest.fixture(params=["tcp", "tls"])
def tls(request, certificates):
    """Return certificates or None: the test runs on both."""
    return certificates if request.param == "tls" else None


def session_for(tls, **options) -> Session:
    session = Session()
    session.trust_env = False
    session.verify = tls.ca_file if tls else True
    if options:
        session.mount("http://", CancellableAdapter(**options))
        session.mount("https://", CancellableAdapter(**options))
    return session


def pool_of(session: requests.Session, peer: Peer):
    pools = session.get_adapter(peer.url()).poolmanager.pools
    return pools[pools.keys()[0]] if isinstance(pools.keys(), list) else pools[next(iter(pools.keys()))]


def test_connection_close_does_not_free_the_guard(tls):
    """Trap 1: http.client closes the connection after the headers, while the body is still being read."""
    with Peer(play.hangs_in_body("close-length"), tls=tls) as peer, session_for(tls) as session:
        token = CancellationToken()
        with use_token(token):
            response = session.get(peer.url(), stream=True)
        attempt = Attempt(response.raw.read, token)
        assert peer.reached.wait(5)
        wait_until(lambda: blocked_in(attempt.thread, "readinto"))
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)


def test_cancelled_wait_for_a_slot_keeps_the_count_of_slots():
    """Trap 2: five cancelled waits neither lose a slot nor add one."""
    peer_script = play.by_path({"/hang": play.hangs_in_body("content-length")}, play.answers())
    with Peer(peer_script) as peer, session_for(None, pool_maxsize=2, pool_block=True) as session:
        held = [session.get(peer.url("/hang"), stream=True) for _ in range(2)]
        pool = pool_of(session, peer)
        for _ in range(5):
            token = CancellationToken()
            attempt = Attempt(lambda: session.get(peer.url()), token)
            wait_until(lambda: pool.pool.waiting == 1)
            token.cancel("stop")
            assert isinstance(attempt.failure(), Cancelled)
        for response in held:
            response.close()
            response.raw.release_conn()
        assert pool.pool.qsize() == 2
        assert [session.get(peer.url()).text for _ in range(4)] == ["hello"] * 4


def test_late_cancel_does_not_touch_the_next_request(tls):
    """Trap 3: a cancel after the end must not reach the connection, which others use by now."""
    with Peer(play.answers(), tls=tls) as peer, session_for(tls) as session:
        for _ in range(5):
            token = CancellationToken()
            with use_token(token):
                assert session.get(peer.url()).text == "hello"
            token.cancel("too late")
        assert session.get(peer.url()).text == "hello"
        assert peer.connections == 1


def test_cancels_racing_with_the_end_of_a_response_hit_nobody_else(tls):
    """Trap 3 under load: whoever takes the connection next is never cut, and never gets half an answer."""
    rounds = 30 if tls else 150  # each cut connection costs TLS a new handshake
    with Peer(play.answers(b"x" * 5000), tls=tls) as peer, session_for(tls) as session:
        stop = threading.Event()

        def innocent() -> int:
            count = 0
            while not stop.is_set():
                assert session.get(peer.url()).content == b"x" * 5000
                count += 1
            return count

        innocents = [Attempt(innocent), Attempt(innocent)]
        try:
            for _ in range(rounds):
                token = CancellationToken()
                with use_token(token):
                    response = session.get(peer.url(), stream=True)
                    canceller = Attempt(lambda token=token: token.cancel("now"))
                    try:
                        body = response.raw.read()
                    except Cancelled:
                        response.close()
                    else:
                        assert body == b"x" * 5000
                canceller.value()
        finally:
            stop.set()
            assert all(attempt.value() > 0 for attempt in innocents)


def test_connection_that_was_cut_is_not_put_back(tls):
    """Trap 4: a response that was complete when the cancel came is whole; its connection is not kept."""
    with Peer(play.answers(), tls=tls) as peer, session_for(tls) as session:
        token = CancellationToken()
        with use_token(token):
            response = session.get(peer.url(), stream=True)
        wait_until(lambda: response.raw._fp.fp.peek(1))  # the body is in the buffer already
        token.cancel("too late to matter")
        assert response.text == "hello"
        pool = pool_of(session, peer)
        assert all(conn is None or conn.sock is None for conn in pool.pool.queue)
        assert session.get(peer.url()).text == "hello"
        assert peer.connections == 2


def test_retry_policy_does_not_send_a_cancelled_request_again(tls):
    """Trap 5: urllib3 takes a shut-down connection for a reason to try again: four requests."""
    retries = Retry(3, read=3, connect=3, allowed_methods=None)
    with Peer(play.hangs_before_headers, tls=tls) as peer, session_for(tls, max_retries=retries) as session:
        token = CancellationToken()
        attempt = Attempt(lambda: session.get(peer.url()), token)
        assert peer.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)
        assert peer.requests == 1


def test_descriptors_are_closed_in_any_order(tls):
    """Trap 6: connection first or response first, both close the socket and the guard's duplicate."""
    with Peer(play.hangs_in_body("content-length"), tls=tls) as peer, session_for(tls) as session:
        first = session.get(peer.url(), stream=True)
        first.raw.connection.close()
        first.close()
        assert peer.closed.wait(5)
        peer.closed.clear()
        second = session.get(peer.url(), stream=True)
        second.raw._fp.close()
        second.raw.connection.close()
        assert peer.closed.wait(5)


@pytest.mark.skipif(not hasattr(urllib3.HTTPResponse, "shutdown"), reason="urllib3 < 2.3 has no response.shutdown()")
def test_shutdown_of_a_response_stays_below_tls(tls):
    """Trap 6: urllib3's `response.shutdown()` drops TLS under a reader; ours only ends the stream."""
    with Peer(play.hangs_in_body("until-close"), tls=tls) as peer, session_for(tls) as session:
        response = session.get(peer.url(), stream=True)
        attempt = Attempt(response.raw.read)
        wait_until(lambda: blocked_in(attempt.thread, "readinto"))
        response.raw.shutdown()
        assert attempt.value() == play.BODIES["until-close"][1]
        response.close()


def test_shutdown_after_the_response_hits_nobody_else():
    """Trap 6: once the connection is back in its pool, the response has lost its power over it."""
    with Peer(play.answers()) as peer, session_for(None) as session:
        session.get(peer.url())
        sock = pool_of(session, peer).pool.queue[-1].sock
        sock.shutdown(2)
        assert session.get(peer.url()).text == "hello"
        assert peer.connections == 1


def test_dropped_response_is_collected_while_its_token_lives(tls):
    """Trap 7: a token holds guards weakly, so the collector closes a stream that nobody keeps."""
    token = CancellationToken()
    with Peer(play.hangs_in_body("content-length"), tls=tls) as peer, session_for(tls) as session:
        with use_token(token):
            response = session.get(peer.url(), stream=True)
        assert peer.reached.wait(5)
        del response
        gc.collect()
        assert peer.closed.wait(5)
        assert not token.cancelled


def test_adapters_and_sessions_pickle():
    """Trap 8: adapters are pickled by attributes; their policy must be of a class that is found again."""
    with session_for(None, max_retries=Retry(2, backoff_factor=0.1), pool_maxsize=3) as session:
        copy = pickle.loads(pickle.dumps(session))
        adapter = copy.get_adapter("http://")
        assert isinstance(adapter, CancellableAdapter)
        assert type(adapter.max_retries) is Retry
        assert adapter.max_retries.total == 2
        with Peer(play.hangs_before_headers) as peer, copy:
            token = CancellationToken()
            attempt = Attempt(lambda: copy.get(peer.url()), token)
            assert peer.reached.wait(5)
            token.cancel("stop")
            assert isinstance(attempt.failure(), Cancelled)


def test_body_read_by_another_thread_is_bound_to_the_token_of_its_request(tls):
    """Trap 9: the token is bound at checkout; the thread that reads has another one, or none."""
    with Peer(play.hangs_in_body("chunked"), tls=tls) as peer, session_for(tls) as session:
        token = CancellationToken()
        opener = Attempt(lambda: session.get(peer.url(), stream=True), token)
        response = opener.value()  # the thread that sent it has ended
        reader = Attempt(lambda: list(response.iter_lines()), token)
        wait_until(lambda: blocked_in(reader.thread, "readinto"))
        token.cancel("stop")
        assert isinstance(reader.failure(), Cancelled)
        assert peer.closed.wait(5)


def test_healthy_reader_of_a_cancelled_tasks_response_is_told_so(tls):
    """`Cancelled` is for threads that are cancelled themselves; another learns that the task was."""
    with Peer(play.hangs_in_body("chunked"), tls=tls) as peer, session_for(tls) as session:
        token = CancellationToken()
        with use_token(token):
            response = session.get(peer.url(), stream=True)
        reader = Attempt(lambda: list(response.iter_lines()))
        wait_until(lambda: blocked_in(reader.thread, "readinto"))
        token.cancel("stop")
        failure = reader.failure()
        assert isinstance(failure, TaskCancelled)
        assert failure.reason is token.reason
        assert peer.closed.wait(5)


def test_upload_to_a_peer_that_does_not_read_is_reset():
    """A FIN would queue behind megabytes that nobody reads; SO_LINGER tells the peer at once."""
    with Peer(play.never_reads_body) as peer, session_for(None) as session:
        token = CancellationToken()
        attempt = Attempt(lambda: session.post(peer.url(), data=b"u" * 64_000_000), token)
        assert peer.reached.wait(5)
        wait_until(lambda: blocked_in(attempt.thread, "sendall"))
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)


def test_sent_but_unread_upload_is_reset_while_the_client_waits_for_headers():
    """The same when `sendall` has returned: what did not leave this machine would hold up the FIN."""
    with Peer(play.never_reads_body) as peer, session_for(None) as session:
        token = CancellationToken()
        body = b"u" * 400_000  # less than both ends buffer, more than the receiver's first window
        attempt = Attempt(lambda: session.post(peer.url(), data=body), token)
        assert peer.reached.wait(5)
        wait_until(lambda: blocked_in(attempt.thread, "readinto"))
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)
