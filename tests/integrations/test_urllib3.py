"""urllib3 without requests: the managers, the queue, the retry policy, and what is refused at import."""

from __future__ import annotations

import pickle
import queue
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import urllib3
from peers import Attempt, Peer, blocked_in, wait_until
from peers import scripts as play
from urllib3.util import Retry

from tokenscope import CancellationToken, Cancelled, TokenScopeError, use_token
from tokenscope.integrations import _urllib3_hooks as hooks
from tokenscope.integrations._missing import needs
from tokenscope.integrations._urllib3_connection import GuardedHTTPConnection
from tokenscope.integrations._urllib3_queue import SlotQueue
from tokenscope.integrations._urllib3_retry import cancellable
from tokenscope.integrations.urllib3 import (
    CancellableRetry,
    PoolManager,
    ProxyManager,
    guard_manager,
    is_guarded,
)

REPOSITORY = Path(__file__).parents[2]


# --- managers -----------------------------------------------------------------------------------------------


def test_pool_manager_is_a_drop_in():
    """Requests, keep-alive and redirects as urllib3 does them."""
    target = play.answers(b"there")
    script = play.by_path({"/here": play.redirects_to("/there")}, target)
    with Peer(script) as peer, PoolManager(num_pools=2, maxsize=1) as manager:
        assert manager.request("GET", peer.url("/here")).data == b"there"
        assert peer.targets == ["/here", "/there"]
        assert peer.connections == 1
        assert is_guarded(manager)


def test_pool_manager_is_cancellable_also_while_it_preloads():
    """urllib3 reads the body inside of the request unless told otherwise."""
    with Peer(play.hangs_in_body("chunked")) as peer, PoolManager() as manager:
        token = CancellationToken()
        attempt = Attempt(lambda: manager.request("GET", peer.url(), retries=3), token)
        assert peer.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)
        assert peer.requests == 1


def test_proxy_manager_is_cancellable():
    """The CONNECT to a proxy included."""
    with Peer(play.hangs_after_connect) as proxy, ProxyManager(proxy.url()) as manager:
        token = CancellationToken()
        attempt = Attempt(lambda: manager.request("GET", "https://127.0.0.1:1/", retries=False), token)
        assert proxy.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert proxy.closed.wait(5)


@pytest.fixture
def pyopenssl():
    """urllib3 with pyOpenSSL below it, as old applications have it."""
    from urllib3.contrib import pyopenssl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pyopenssl.inject_into_urllib3()
    yield
    pyopenssl.extract_from_urllib3()


@pytest.mark.usefixtures("pyopenssl")
@pytest.mark.parametrize("body", [b"", b"x" * 200_000], ids=["bodyless", "upload"])
def test_pyopenssl_answers_and_is_cut_as_the_standard_librarys_tls(certificates, body):
    """Its sockets, which are none of the standard library's, are guarded as well."""
    ca = certificates.ca_file
    with Peer(play.answers(b"hello"), tls=certificates) as peer, PoolManager(ca_certs=ca) as manager:
        with use_token(CancellationToken()):
            assert manager.request("POST", peer.url(), body=body).data == b"hello"
    with Peer(play.hangs_in_body("chunked"), tls=certificates) as peer, PoolManager(ca_certs=ca) as manager:
        token = CancellationToken()
        attempt = Attempt(lambda: manager.request("POST", peer.url(), body=body), token)
        assert peer.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)


def test_pool_timeout_still_counts():
    """A wait for a slot that is limited by urllib3's own timeout ends as EmptyPoolError."""
    with Peer(play.hangs_in_body("content-length")) as peer, PoolManager(maxsize=1, block=True) as manager:
        held = manager.request("GET", peer.url(), preload_content=False)
        with use_token(CancellationToken(timeout=30)), pytest.raises(urllib3.exceptions.EmptyPoolError):
            manager.request("GET", peer.url(), pool_timeout=0.02)
        held.close()


def test_guarding_a_manager_twice_changes_nothing():
    """Guarded classes stay the classes they are."""
    with urllib3.PoolManager() as manager:
        guard_manager(manager)
        classes = dict(manager.pool_classes_by_scheme)
        guard_manager(manager)
        assert manager.pool_classes_by_scheme == classes
        other = urllib3.PoolManager()
        assert not is_guarded(other)


# --- the queue of slots -------------------------------------------------------------------------------------


def test_slot_queue_hands_every_item_to_somebody():
    """Many threads take and give back, some are cancelled while they wait: no slot is lost."""
    slots = SlotQueue(3)
    for number in range(3):
        slots.put(number)
    tokens = [CancellationToken() for _ in range(12)]

    def work(token: CancellationToken) -> int:
        taken = 0
        with use_token(token):
            for _ in range(150):
                try:
                    slot = slots.get(timeout=10)
                except queue.Empty:
                    assert token.cancelled
                    return taken
                taken += 1
                slots.put(slot)
        return taken

    attempts = [Attempt(lambda token=token: work(token)) for token in tokens]
    for token in tokens[::3]:
        token.cancel("stop")
    counts = [attempt.value(30) for attempt in attempts]
    assert [count for number, count in enumerate(counts) if number % 3] == [150] * 8
    assert slots.qsize() == 3
    assert slots.waiting == 0


def test_slot_queue_passes_a_wake_up_on():
    """A waiter that is woken for an item and cancelled at once wakes the next one in its place."""
    for _ in range(100):
        slots = SlotQueue()
        first, second = CancellationToken(), CancellationToken()
        attempts = []
        for waiting, token in enumerate((first, second), start=1):
            attempts.append(Attempt(lambda slots=slots: slots.get(timeout=10), token))
            wait_until(lambda slots=slots, n=waiting: slots.waiting == n)
        putter = Attempt(lambda slots=slots: slots.put("slot"))
        first.cancel("race")
        putter.value()
        try:
            assert attempts[0].value() == "slot"
        except queue.Empty:
            assert attempts[1].value() == "slot"
        else:
            second.cancel("over")
            assert isinstance(attempts[1].failure(), queue.Empty)


def test_slot_queue_does_not_wait_unless_asked():
    """`get(block=False)` is urllib3's own way to look, and `timeout` limits a wait."""
    slots = SlotQueue()
    with pytest.raises(queue.Empty):
        slots.get(block=False)
    with pytest.raises(queue.Empty):
        slots.get(timeout=0.01)
    with use_token(CancellationToken(timeout=0.01)) as token, pytest.raises(queue.Empty):
        slots.get(timeout=10)
    assert token.reason is not None
    assert token.reason.kind == "deadline"


# --- retries ------------------------------------------------------------------------------------------------


class CountingRetry(Retry):
    """Somebody's own policy."""

    def get_backoff_time(self) -> float:
        return 30.0


class SleepyRetry(Retry):
    """Somebody's own way to sleep."""

    def sleep(self, response: object = None) -> None:
        """Do not sleep at all."""


def test_retry_policies_keep_their_class_and_settings():
    """A subclass stays one; one that sleeps in a way of its own, or never, is left alone."""
    twin = cancellable(CountingRetry(3, status_forcelist=[500]))
    assert isinstance(twin, CountingRetry)
    assert twin.total == 3
    assert twin.status_forcelist == [500]
    assert type(cancellable(CountingRetry(2))) is type(twin)
    sleepy, none, off = SleepyRetry(3), Retry(0, read=False), Retry(total=False)
    assert [cancellable(policy) for policy in (sleepy, none, off)] == [sleepy, none, off]
    own = CancellableRetry(2)
    assert cancellable(own) is own
    assert pickle.loads(pickle.dumps(own)).total == 2


def test_backoff_of_a_users_policy_ends_with_the_token():
    """The pause between two attempts is a checkpoint."""
    with Peer(play.answers(status="500 Oops")) as peer, PoolManager() as manager:
        token = CancellationToken()
        policy = CountingRetry(3, status_forcelist=[500])
        attempt = Attempt(lambda: manager.request("GET", peer.url(), retries=policy), token)
        wait_until(lambda: blocked_in(attempt.thread, "_pause"))
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.requests == 1


def test_short_retries_succeed():
    """Under a live token a policy does what it says."""
    answers = iter(["503 Later", "200 OK"])

    def script(exchange) -> None:
        exchange.peek_target()  # until there is a request
        play.answers(b"done", status=next(answers), headers={"Retry-After": "0"})(exchange)

    with Peer(script) as peer, PoolManager() as manager, use_token(CancellationToken(timeout=30)):
        policy = Retry(3, status_forcelist=[503], backoff_factor=0.001)
        assert manager.request("GET", peer.url(), retries=policy).data == b"done"
        assert peer.requests == 2


# --- what is refused ----------------------------------------------------------------------------------------


def test_http2_mode_is_refused(monkeypatch):
    """At import, for a new manager, and for a new pool of an old one."""
    with PoolManager() as manager:
        monkeypatch.setattr(hooks.ssl_, "ALPN_PROTOCOLS", ["h2"])
        with pytest.raises(TokenScopeError, match="HTTP/2"):
            hooks.check_hooks()
        with pytest.raises(TokenScopeError, match="HTTP/2"):
            PoolManager()
        with pytest.raises(TokenScopeError, match="HTTP/2"):
            manager.request("GET", "https://127.0.0.1:1/")


def test_missing_hook_is_refused_by_name(monkeypatch):
    """A urllib3 of the future that lost a hook is no surprise at run time, but an ImportError."""
    monkeypatch.setitem(hooks.HOOKS, hooks.Retry, ("sleep", "no_such_hook"))
    with pytest.raises(ImportError, match=r"Retry\.no_such_hook"):
        hooks.check_hooks()


def test_urllib3_future_is_refused(monkeypatch):
    """The fork that takes urllib3's name has connections that work in another way."""
    monkeypatch.setattr(hooks.importlib.util, "find_spec", lambda name: name == "urllib3.backend" or None)
    with pytest.raises(ImportError, match="urllib3-future"):
        hooks.check_hooks()


def test_missing_library_says_what_to_install():
    """The name of the extra, or of the library; an error of another library passes."""
    with (
        pytest.raises(ImportError, match=r"tokenscope-threads\[flask\]"),
        needs("no_such_library", extra="flask"),
    ):
        import no_such_library
    with pytest.raises(ImportError, match=r"pip install 'no_such_library'"), needs("no_such_library"):
        import no_such_library.inner
    with pytest.raises(ModuleNotFoundError, match=r"^No module"), needs("flask"):
        import no_such_library  # noqa: F401


def test_importing_the_package_of_integrations_imports_no_library():
    """Importing an adapter is the way to ask for it."""
    program = "import sys, tokenscope.integrations; assert not {'urllib3', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY, timeout=30)


def test_connection_used_without_a_pool_works_for_the_current_token():
    """http.client style: nobody binds it, so it looks for itself when it connects."""
    with Peer(play.hangs_before_headers) as peer:
        conn = GuardedHTTPConnection("127.0.0.1", peer.port)
        token = CancellationToken()

        def call() -> None:
            conn.request("GET", "/")
            conn.getresponse()

        attempt = Attempt(call, token)
        assert peer.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)


def test_connection_used_without_a_pool_closes_itself_when_an_upload_is_cut():
    """Some callers (requests 2.28) clean up after an `Exception` only."""
    with Peer(play.reads_body_late) as peer:
        conn = GuardedHTTPConnection("127.0.0.1", peer.port)
        token = CancellationToken()
        attempt = Attempt(lambda: conn.request("POST", "/", body=b"u" * 64_000_000), token)
        assert peer.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert peer.closed.wait(5)


def test_half_an_answer_to_connect_is_no_connection():
    """http.client takes an end in the headers for their end; the token does not."""
    with Peer(play.hangs_in_connect_answer) as proxy:
        conn = GuardedHTTPConnection("127.0.0.1", proxy.port)
        conn.set_tunnel("127.0.0.1", 1)
        token = CancellationToken()
        attempt = Attempt(conn.connect, token)
        assert proxy.reached.wait(5)
        token.cancel("stop")
        assert isinstance(attempt.failure(), Cancelled)
        assert proxy.closed.wait(5)
