"""Every phase of a request in which httpx, or its fork, can be blocked; as `phases`, whose stages they are."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from peers import Authority, FullBacklog, Peer, blocked_in, wait_until
from peers import scripts as play
from phases import BOTH, LONG, TLS, UPLOAD, Stage, chunks, wait_for


@dataclass
class Bench:
    """What the phases are built with.

    Attributes:
        library: ``httpx`` or ``httpx2``.
        ours: Our integration of it.
        authority: Certificates, or None for plain TCP.
        timeout: The ``timeout=`` of each request.
    """

    library: Any
    ours: Any
    authority: Authority | None
    timeout: float | None
    exits: ExitStack = field(default_factory=ExitStack)

    def client(self, **options: Any) -> Any:
        """Return a client that trusts the peers and no environment variable."""
        verify: Any = True
        if self.authority:
            verify = self.library.create_ssl_context()
            verify.load_verify_locations(self.authority.ca_file)
        settings: dict[str, Any] = {"verify": verify, "trust_env": False, "timeout": self.timeout, **options}
        return self.exits.enter_context(self.ours.Client(**settings))

    def peer(self, script: play.Script) -> Peer:
        """Start a peer that plays a script."""
        return self.exits.enter_context(Peer(script, tls=self.authority))

    @property
    def scheme(self) -> str:
        return "https" if self.authority else "http"


Phase = Callable[[Bench], Any]


def simple(
    script: play.Script, read: Callable[[Any], object] | None = None, method: str = "GET", **options: Any
) -> Phase:
    """One request to one peer; ``read`` reads the streamed response, without it the client does."""

    @contextmanager
    def phase(bench: Bench) -> Iterator[Stage]:
        peer, client = bench.peer(script), bench.client()
        arguments = {name: make() for name, make in options.items()}

        def call() -> object:
            if read is None:
                return client.request(method, peer.url(), **arguments)
            with client.stream(method, peer.url(), **arguments) as response:
                return read(response)

        yield Stage(call, lambda _: wait_for(peer.reached), peer)

    return phase


@contextmanager
def pool_slot(bench: Bench) -> Iterator[Stage]:
    """All connections are taken."""
    peer = bench.peer(play.hangs_in_body("content-length"))
    client = bench.client(limits=bench.library.Limits(max_connections=1))
    with client.stream("GET", peer.url()):
        yield Stage(
            lambda: client.get(peer.url()),
            lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "wait")),
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
        client = bench.client()
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        try:
            yield Stage(lambda: client.get(f"{bench.scheme}://a-name.test/"), lambda _: wait_for(asked))
        finally:
            answer.set()
            wait_until(lambda: not [t for t in threading.enumerate() if t.name == "tokenscope-resolve"])


@contextmanager
def tcp_connect(bench: Bench) -> Iterator[Stage]:
    """The SYN is not answered."""
    with FullBacklog() as backlog:
        client, url = bench.client(), backlog.url(scheme=bench.scheme)
        yield Stage(lambda: client.get(url), lambda _: wait_until(lambda: backlog.connecting() == 1))


def proxied(script: play.Script, scheme: str = "http") -> Phase:
    """The proxy hangs."""

    @contextmanager
    def phase(bench: Bench) -> Iterator[Stage]:
        proxy = bench.exits.enter_context(Peer(script))
        client = bench.client(proxy=proxy.url().replace("http", scheme, 1))
        requests = 1 if scheme == "http" else 0
        yield Stage(
            lambda: client.get("https://127.0.0.1:1/"), lambda _: wait_for(proxy.reached), proxy, requests=requests
        )

    return phase


@contextmanager
def through_tunnel(bench: Bench) -> Iterator[Stage]:
    """The tunnel stands; the server behind it is silent."""
    proxy = bench.exits.enter_context(Peer(play.tunnels))
    peer, client = bench.peer(play.hangs_before_headers), bench.client(proxy=proxy.url())
    yield Stage(lambda: client.get(peer.url()), lambda _: wait_for(peer.reached), peer)


@contextmanager
def handshake(bench: Bench) -> Iterator[Stage]:
    """The server accepts and never says hello."""
    peer, client = bench.exits.enter_context(Peer(play.never_answers, scheme="https")), bench.client()
    yield Stage(
        lambda: client.get(peer.url()),
        lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "do_handshake")),
        peer,
        requests=0,
    )


@contextmanager
def redirect_target(bench: Bench) -> Iterator[Stage]:
    """The first server redirects to one that hangs."""
    target = bench.peer(play.hangs_before_headers)
    first, client = bench.peer(play.redirects_to(target.url())), bench.client(follow_redirects=True)
    yield Stage(lambda: client.get(first.url()), lambda _: wait_for(target.reached), target)


@contextmanager
def connect_retry(bench: Bench) -> Iterator[Stage]:
    """Nobody listens, and the transport waits before it tries again."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    transport = bench.ours.CancellableTransport(retries=50, trust_env=False)
    client = bench.client(transport=transport)
    yield Stage(
        lambda: client.get(f"{bench.scheme}://127.0.0.1:{port}/"),
        lambda attempt: wait_until(lambda: blocked_in(attempt.thread, "sleep")),
    )


def by_chunks(response: Any) -> object:
    return b"".join(response.iter_bytes())


def by_lines(response: Any) -> object:
    return list(response.iter_lines())


def raw(response: Any) -> object:
    return b"".join(response.iter_raw())


#: By name: the phase, and the transports it exists on.
PHASES: dict[str, tuple[Phase, tuple[str, ...]]] = {
    "pool-slot": (pool_slot, BOTH),
    "name-lookup": (name_lookup, BOTH),
    "connect": (tcp_connect, BOTH),
    "connect-retry": (connect_retry, ("tcp",)),
    "proxy-connect": (proxied(play.hangs_after_connect), TLS),
    "proxy-half-answer": (proxied(play.hangs_in_connect_answer), TLS),
    "proxy-socks": (proxied(play.never_answers, "socks5"), TLS),
    "proxy-tunnel": (through_tunnel, TLS),
    "handshake": (handshake, TLS),
    "upload": (simple(play.reads_body_late, method="POST", content=lambda: b"u" * UPLOAD), BOTH),
    "upload-chunked": (simple(play.reads_body_late, method="POST", content=chunks), BOTH),
    "headers": (simple(play.hangs_before_headers), BOTH),
    "half-headers": (simple(play.hangs_in_headers), BOTH),
    **{f"body-{kind}": (simple(play.hangs_in_body(kind)), BOTH) for kind in play.BODIES},
    **{f"stream-{kind}": (simple(play.hangs_in_body(kind), by_chunks), BOTH) for kind in play.BODIES},
    "raw-close-length": (simple(play.hangs_in_body("close-length"), raw), BOTH),
    "sse-lines": (simple(play.hangs_in_body("sse"), by_lines), BOTH),
    "drip-lines": (simple(play.drips, by_lines), BOTH),
    "redirect-target": (redirect_target, BOTH),
}
