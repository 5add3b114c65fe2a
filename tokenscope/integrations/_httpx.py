"""One transport and one client for httpx and its fork httpx2, which differ in their names only.

How a request travels::

    Client.send -> CancellableTransport.handle_request      takes a slot (a cancellable wait)
                       -> httpcore's pool -> Backend, Stream (_httpx_stream.py)    every blocking call is guarded
                   <- Response(stream=Body)
    Body.close                                              the stream is freed of its token, then the pool has it
                                                            back, then the slot is free

A slot: the pool's own wait for a connection cannot be reached, so nobody is let in for whom it would have to wait.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

from tokenscope._core.current import current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._binding import check_token, decide, under
from tokenscope.integrations._httpx_stream import Backend, Stream
from tokenscope.integrations._httpx_tls import SharedContext
from tokenscope.sync import Semaphore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from tokenscope._core.token import CancellationToken

__all__ = ["Body", "ClientHooks", "Library", "Transport"]


class Library(NamedTuple):
    """A fork: its client library, and the one below it."""

    httpx: Any
    httpcore: Any

    @classmethod
    def probed(cls, httpx: ModuleType, httpcore: ModuleType) -> Library:
        """The two modules, once it is sure that all is there that is used of them.

        Raises:
            TokenScopeError: Something is missing: a version that is not supported.
        """
        library = cls(httpx, httpcore)
        for pool in ("ConnectionPool", "HTTPProxy"):
            _insist(httpcore, pool, "network_backend")
        _insist(httpx, "Client._init_transport", "transport")
        _insist(httpx, "Client._init_proxy_transport", "proxy")
        return library

    def raise_translated(self, error: Exception) -> NoReturn:
        """Raise the client library's error of the same name; what is none of httpcore's is raised as it is."""
        for kind in type(error).__mro__:
            if kind is getattr(self.httpcore, kind.__name__, None):
                same = getattr(self.httpx, kind.__name__, None)
                if same is not None and issubclass(same, Exception):
                    raise same(str(error)) from error
        raise error


def _insist(module: Any, path: str, parameter: str) -> None:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    if found is None or parameter not in inspect.signature(found).parameters:
        version = getattr(module, "__version__", "of unknown version")
        raise TokenScopeError(
            f"{module.__name__} {version} has no {path}(..., {parameter}=...): tokenscope does not support it"
        )


class Transport:
    """Mixed into a fork's ``BaseTransport``; see `tokenscope.integrations.httpx.CancellableTransport`."""

    _library: Library
    _body: Callable[..., Any]

    def __init__(
        self,
        verify: Any = True,
        cert: Any = None,
        trust_env: bool = True,
        http1: bool = True,
        http2: bool = False,
        limits: Any = None,
        proxy: Any = None,
        uds: str | None = None,
        local_address: str | None = None,
        retries: int = 0,
        socket_options: Any = None,
        *,
        token: CancellationToken | None = None,
    ) -> None:
        check_token(token)
        _refuse_http2(http2)
        httpx, _httpcore = self._library
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=20) if limits is None else limits
        settings = {
            "ssl_context": SharedContext(httpx.create_ssl_context(verify=verify, cert=cert, trust_env=trust_env)),
            "max_connections": limits.max_connections,
            "max_keepalive_connections": limits.max_keepalive_connections,
            "keepalive_expiry": limits.keepalive_expiry,
            "http1": http1,
            "http2": False,
        }
        self._token = token
        self._slots = None if limits.max_connections is None else Semaphore(limits.max_connections)
        if isinstance(proxy, str | httpx.URL):
            proxy = httpx.Proxy(proxy)
        if proxy is None:
            settings |= {"retries": retries, "uds": uds, "local_address": local_address}
        self._pool = self._make_pool(proxy, settings, socket_options)

    def _make_pool(self, proxy: Any, settings: dict[str, Any], socket_options: Any) -> Any:
        httpcore = self._library.httpcore
        settings["network_backend"] = Backend(httpcore)
        if proxy is None:
            return httpcore.ConnectionPool(socket_options=socket_options, **settings)
        settings |= {"proxy_url": _core_url(httpcore, proxy.url), "proxy_auth": proxy.raw_auth}
        if proxy.url.scheme == "http":
            return httpcore.HTTPProxy(proxy_headers=proxy.headers.raw, socket_options=socket_options, **settings)
        if proxy.url.scheme in {"socks5", "socks5h"}:
            return httpcore.SOCKSProxy(**settings)
        raise TokenScopeError(
            f"a proxy of scheme {proxy.url.scheme!r} is not supported: http, socks5 and socks5h are (docs/limits.md)"
        )

    def __enter__(self) -> Self:
        self._pool.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._pool.__exit__(*details)

    def close(self) -> None:
        """Close idle connections and those in use."""
        self._pool.close()

    def handle_request(self, request: Any) -> Any:
        """Send one request (of perhaps several, if redirected), or raise what the token says."""
        with under(self._token):
            current_token().check()
            release = self._take_slot(request)
            try:
                answer = self._ask(request)
            except BaseException:
                release()
                raise
        return self._library.httpx.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=self._body(answer, self._library, release),
            extensions=answer.extensions,
        )

    def _take_slot(self, request: Any) -> Callable[[], object]:
        """Wait until the pool has a connection to spare; what gives it back."""
        if self._slots is None:
            return _nothing
        patience = request.extensions.get("timeout", {}).get("pool")
        if not self._slots.acquire(timeout=patience):
            raise self._library.httpx.PoolTimeout(f"no connection became free in {patience} s", request=request)
        return self._slots.release

    def _ask(self, request: Any) -> Any:
        httpcore = self._library.httpcore
        question = httpcore.Request(
            method=request.method,
            url=_core_url(httpcore, request.url),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        try:
            return self._pool.handle_request(question)
        except Exception as error:
            decide(current_token(), error)
            self._library.raise_translated(error)


def _core_url(httpcore: Any, url: Any) -> Any:
    return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _refuse_http2(http2: object) -> None:
    if http2:
        raise TokenScopeError(
            "http2=True is not supported: many requests share one connection there, and to cut one of them would cut"
            " all. Leave it out, and each request has a connection of its own while it runs"
        )


def _nothing() -> None:
    """There was no slot to give back."""


class Body:
    """Mixed into a fork's ``SyncByteStream``: a response's body, bound to its token until it is closed."""

    def __init__(self, answer: Any, library: Library, release: Callable[[], object]) -> None:
        self._stream = answer.stream
        self._connection = answer.extensions.get("network_stream")
        self._library = library
        self._releases = [release]  # popped by the one call of `close` that closes

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._stream
        except Exception as error:
            self.close()
            self._library.raise_translated(error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the connection back, or close it if the body was not read to its end. Idempotent."""
        try:
            release = self._releases.pop()
        except IndexError:
            return
        try:
            if isinstance(self._connection, Stream):
                self._connection.detach()  # first: in the pool no cancel may reach it
            self._stream.close()
        finally:
            release()


class ClientHooks:
    """Mixed into a fork's ``Client``; see `tokenscope.integrations.httpx.Client`.

    The two hooks are the client's own and have underscores: through its public arguments a transport of ours would cost
    it the proxies of the environment (docs/decisions/0008).
    """

    _library: Library
    _transport_kind: Callable[..., Any]
    _token: CancellationToken | None = None

    def __init__(self, *, token: CancellationToken | None = None, **options: Any) -> None:
        check_token(token)
        _refuse_http2(options.get("http2"))
        for given in (options.get("transport"), *(options.get("mounts") or {}).values()):
            self._refuse_uncancellable(given)
        self._token = token
        super().__init__(**options)

    def _refuse_uncancellable(self, transport: object) -> None:
        if isinstance(transport, self._library.httpx.HTTPTransport):
            raise TokenScopeError(
                "a cancel does not reach into an HTTPTransport: make it a CancellableTransport, which takes the same"
                " arguments"
            )

    def _init_transport(self, *args: Any, **options: Any) -> Any:
        if options.get("transport") is not None or options.get("app") is not None:  # `app` until httpx 0.27
            above: Any = super()
            return above._init_transport(*args, **options)  # noqa: SLF001 - what this overrides
        return self._make_transport(options)

    def _init_proxy_transport(self, proxy: Any, *_: Any, **options: Any) -> Any:
        return self._make_transport({**options, "proxy": proxy})

    def _make_transport(self, options: dict[str, Any]) -> Any:
        known = {name: value for name, value in options.items() if name not in {"transport", "app"}}
        return self._transport_kind(**known, token=self._token)
