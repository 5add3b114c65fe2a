"""Every phase of a request in which a client can be blocked, each with a peer that makes it so.

A phase is a context manager that yields a `Stage`: the call to make, how to know that it is blocked, and who
looks on.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
from peers import Attempt, Authority, FullBacklog, Peer, blocked_in, wait_until
from peers import scripts as play
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from tokenscope.integrations.requests import CancellableAdapter, Session

UPLOAD = 64 * 1024 * 1024  # more than any pair of socket buffers takes
LONG = 60.0  # a pause that no test sits out


@dataclass
class Bench:
    """What the phases are built with.

    Attributes:
        authority: Certificates, or None for plain TCP.
        timeout: The ``timeout=`` of each request.
        plain: With requests' own sessions and adapters, for whom `instrument` is on.
    """

    authority: Authority | None
    timeout: float | None
    plain: bool = False
    exits: ExitStack = field(default_factory=ExitStack)

    def session(self, **options: Any) -> requests.Session:
        """Return a session that trusts the peers and no environment variable."""
        session = self.exits.enter_context(requests.Session() if self.plain else Session())
        session.trust_env = False
        session.verify = self.authority.ca_file if self.authority else True
        if options:
            adapter = HTTPAdapter(**options) if self.plain else CancellableAdapter(**options)
            session.mount("http://", adapter)
            session.mount("https://", adapter)
        return session

    def peer(self, script: play.Script) -> Peer:
        """Start a peer that plays a script."""
        return self.exits.enter_context(Peer(script, tls=self.authority))


@dataclass
class Stage:
    """A call that will block.

    Attributes:
        call: Makes it.
        reached: Returns once the call is blocked where it should be.
        peer: The server that looks on; None where nobody is connected.
        requests: How many requests the peer has seen at the end; one more would be a resend.
        sees_close: Whether the peer sees the client hang up.
    """

    call: Callable[[], Any]
    reached: Callable[[Attempt], None]
    peer: Peer | None = None
    requests: int = 1
    sees_close: bool = True


Phase = Callable[[Bench], AbstractContextManager[Stage]]


def simple(
    script: play.Script, read: Callable[[Any], object] | None = None, method: str = "GET", **options: Any
) -> Phase:
    """One request to one peer; ``read`` reads the streamed response, without it requests does."""

    @contextmanager
    def phase(bench: Bench) -> Iterator[Stage]:
        peer, session = bench.peer(script), bench.session()

        def call() -> object:
            response = session.request(
                method,
                peer.url(),
                timeout=bench.timeout,
                stream=read is not None,
                **{k: v() for k, v in options.items()},
            )
            return read(response) if read else response.content

        yield Stage(call, lambda _: wait_for(peer.reached), peer)

    return phase


def wait_for(event: threading.Event) -> None:
    assert event.wait(5), "the peer never got there"


@contextmanager
def pool_slot(bench: Bench) -> Iterator[Stage]:
    """All connections are taken, and the pool makes callers wait."""
    peer = bench.peer(play.hangs_in_body("content-length"))
    session = bench.session(pool_maxsize=1, pool_block=True)
    with session.get(peer.url(), stream=True):
        yield Stage(
            lambda: session.get(peer.url(), timeout=bench.timeout),
            lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "wait")),
            requests=1,
        )


@contextmanager
def name_lookup(bench: Bench) -> Iterator[Stage]:
    """The resolver does not answer."""
    asked, answer = threading.Event(), threading.Event()

    def getaddrinfo(*_: object, **__: object) -> Any:
        asked.set()
        answer.wait(LONG)
        raise socket.gaierror(socket.EAI_AGAIN, "the test is over")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        scheme = "https" if bench.authority else "http"
        try:
            yield Stage(
                lambda: bench.session().get(f"{scheme}://a-name.test/", timeout=bench.timeout),
                lambda _: wait_for(asked),
            )
        finally:
            answer.set()
            wait_until(lambda: not [t for t in threading.enumerate() if t.name == "tokenscope-resolve"])


@contextmanager
def tcp_connect(bench: Bench) -> Iterator[Stage]:
    """The SYN is not answered."""
    with FullBacklog() as backlog:
        url = backlog.url(scheme="https" if bench.authority else "http")
        yield Stage(
            lambda: bench.session().get(url, timeout=bench.timeout),
            lambda _: wait_until(lambda: backlog.connecting() == 1),
        )


def proxied(script: play.Script) -> Phase:
    """The proxy hangs after CONNECT."""

    @contextmanager
    def phase(bench: Bench) -> Iterator[Stage]:
        proxy, session = bench.exits.enter_context(Peer(script)), bench.session()
        session.proxies = {"https": proxy.url()}
        yield Stage(
            lambda: session.get("https://127.0.0.1:1/", timeout=bench.timeout),
            lambda _: wait_for(proxy.reached),
            proxy,
        )

    return phase


@contextmanager
def through_tunnel(bench: Bench) -> Iterator[Stage]:
    """The tunnel stands; the server behind it is silent."""
    proxy = bench.exits.enter_context(Peer(play.tunnels))
    peer, session = bench.peer(play.hangs_before_headers), bench.session()
    session.proxies = {"https": proxy.url()}
    yield Stage(lambda: session.get(peer.url(), timeout=bench.timeout), lambda _: wait_for(peer.reached), peer)


@contextmanager
def handshake(bench: Bench) -> Iterator[Stage]:
    """The server accepts and never says hello."""
    peer, session = bench.exits.enter_context(Peer(play.never_answers, scheme="https")), bench.session()
    yield Stage(
        lambda: session.get(peer.url(), timeout=bench.timeout),
        lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "do_handshake")),
        peer,
        requests=0,
    )


@contextmanager
def redirect_target(bench: Bench) -> Iterator[Stage]:
    """The first server redirects to one that hangs."""
    target = bench.peer(play.hangs_before_headers)
    first, session = bench.peer(play.redirects_to(target.url())), bench.session()
    yield Stage(lambda: session.get(first.url(), timeout=bench.timeout), lambda _: wait_for(target.reached), target)


def retried(script: play.Script, requests: int, **policy: Any) -> Phase:
    """Urllib3 waits before it tries again, having tried so often."""

    @contextmanager
    def phase(bench: Bench) -> Iterator[Stage]:
        retries = Retry(total=3, status_forcelist=[500], raise_on_status=False, **policy)
        peer, session = bench.peer(script), bench.session(max_retries=retries)
        yield Stage(
            lambda: session.get(peer.url(), timeout=bench.timeout),
            lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "_pause") and peer.requests == requests),
            peer,
            requests,
            sees_close=False,  # the answer was complete: the connection is idle in the pool
        )

    return phase


def chunks() -> Iterator[bytes]:
    """Yield a body without end."""
    while True:
        yield b"c" * 65536


def whole(response: Any) -> object:
    return response.raw.read()


def by_chunks(response: Any) -> object:
    return b"".join(response.iter_content(1))


def by_lines(response: Any) -> object:
    return list(response.iter_lines())


BOTH, TLS = ("tcp", "tls"), ("tls",)

#: By name: the phase, and the transports it exists on.
PHASES: dict[str, tuple[Phase, tuple[str, ...]]] = {
    "pool-slot": (pool_slot, BOTH),
    "name-lookup": (name_lookup, BOTH),
    "connect": (tcp_connect, BOTH),
    "proxy-connect": (proxied(play.hangs_after_connect), TLS),
    "proxy-half-answer": (proxied(play.hangs_in_connect_answer), TLS),
    "proxy-tunnel": (through_tunnel, TLS),
    "handshake": (handshake, TLS),
    "upload": (simple(play.reads_body_late, method="POST", data=lambda: b"u" * UPLOAD), BOTH),
    "upload-chunked": (simple(play.reads_body_late, method="POST", data=chunks), BOTH),
    "headers": (simple(play.hangs_before_headers), BOTH),
    "half-headers": (simple(play.hangs_in_headers), BOTH),
    **{f"body-{kind}": (simple(play.hangs_in_body(kind)), BOTH) for kind in play.BODIES},
    **{f"stream-{kind}": (simple(play.hangs_in_body(kind), by_chunks), BOTH) for kind in play.BODIES},
    **{f"raw-{kind}": (simple(play.hangs_in_body(kind), whole), BOTH) for kind in play.BODIES},
    "sse-lines": (simple(play.hangs_in_body("sse"), by_lines), BOTH),
    "drip-lines": (simple(play.drips, by_lines), BOTH),
    "drip-whole": (simple(play.drips), BOTH),
    "redirect-target": (redirect_target, BOTH),
    "redirect-body": (simple(play.redirect_body_hangs), BOTH),
    "retry-backoff": (retried(play.answers(status="500 Oops"), 2, backoff_factor=LONG), BOTH),
    "retry-after": (retried(play.answers(status="503 Later", headers={"Retry-After": "60"}), 1), BOTH),
}
