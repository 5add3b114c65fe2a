"""Cancellable requests: a drop-in `Session`, `mount` for somebody else's session, `instrument` for all.

guarded:      waiting for a pool slot, name look-up, connect, proxy CONNECT, TLS handshake, upload, headers,
    body, redirects, retries
interrupted:  the canceller shuts the socket down on a duplicate descriptor; the owner looks at its token,
    raises and closes
not:          a user's body generator blocked in next(); SOCKS (a `Session` refuses, the others leave it
    alone); HTTP/2 (refused)
versions:     requests >=2.28,<3 on urllib3 >=1.26,<3
compat:       urllib3-1.26.20, urllib3-2.0.7, urllib3-latest, each with requests-2.28.2 and requests-latest
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from tokenscope._core._typing import override
from tokenscope._core.current import current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._missing import needs
from tokenscope.integrations._urllib3_binding import decide, under
from tokenscope.integrations.urllib3 import guard_manager, is_guarded

with needs("requests"):
    import requests
    from requests.adapters import HTTPAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

    import urllib3

    from tokenscope._core.token import CancellationToken

__all__ = ["CancellableAdapter", "Session", "instrument", "mount", "uninstrument"]


class CancellableAdapter(HTTPAdapter):
    """`requests.adapters.HTTPAdapter` whose requests end with the current token.

    Args:
        token: Ends them as well, besides the current token (never instead of it). Not pickled with the
            adapter.

    All other arguments are requests' own. In each phase of a request a cancel raises `Cancelled` with the
    token's reason; the transport's error, if it came to one, is its ``__cause__``. The deadline of the token
    caps name look-up, connect, handshake, redirects, retries and body together, where ``timeout=`` limits
    each wait alone.
    """

    token: CancellationToken | None = None

    def __init__(self, *args: Any, token: CancellationToken | None = None, **kwargs: Any) -> None:
        self.token = token
        super().__init__(*args, **kwargs)

    @override
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        """As requests', with cancellable pools."""
        super().init_poolmanager(*args, **kwargs)
        guard_manager(self.poolmanager)

    @override
    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        """As requests', with cancellable pools.

        Raises:
            TokenScopeError: A SOCKS proxy, in whose connect a cancel could not reach the request.
        """
        manager = super().proxy_manager_for(proxy, **kwargs)
        if not is_guarded(manager):
            guard_manager(manager)
        return manager

    @override
    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send one request (of perhaps several, if redirected), or raise what the token says."""
        if self.token is None:
            return _send(super().send, args, kwargs)
        with under(self.token):
            return _send(super().send, args, kwargs)


class Session(requests.Session):
    """`requests.Session` whose requests end with the current token.

    Args:
        token: Ends them as well, besides the current token (never instead of it). Not pickled with the
            session.

    Thread-safe as far as `requests.Session` is. A streaming response stays bound to the token it was opened
    under until it is closed or read to the end, whichever thread reads it.
    """

    def __init__(self, *, token: CancellationToken | None = None) -> None:
        super().__init__()
        self.mount("https://", CancellableAdapter(token=token))
        self.mount("http://", CancellableAdapter(token=token))


def mount(session: requests.Session) -> None:
    """Make the requests of an existing session end with the current token.

    Its adapters stay, with all their settings; their pools are replaced, and idle connections closed.
    Adapters that are no `HTTPAdapter`, and connections to SOCKS proxies, are left as they are.
    """
    for adapter in session.adapters.values():
        if isinstance(adapter, HTTPAdapter):
            _instrumented.discard(adapter)
            _guard_adapter(adapter)


def instrument() -> None:
    """Make the requests of every session in this process, present and future, end with the current token.

    Sessions of other libraries and ``requests.get(...)`` included. Outside any scope nothing changes.
    Idempotent.
    """
    with _lock:
        HTTPAdapter.send = _instrumented_send  # type: ignore[method-assign, assignment]


def uninstrument() -> None:
    """Undo `instrument`. Responses that are open stay cancellable until they are closed. Idempotent."""
    with _lock:
        HTTPAdapter.send = _plain_send  # type: ignore[method-assign]
        for adapter in list(_instrumented):
            _restore_adapter(adapter)
        _instrumented.clear()


_lock = threading.Lock()
_plain_send = HTTPAdapter.send
# Adapters that only `instrument` has changed; changed under the lock.
_instrumented: weakref.WeakSet[HTTPAdapter] = weakref.WeakSet()


def _instrumented_send(adapter: HTTPAdapter, *args: Any, **kwargs: Any) -> requests.Response:
    if not is_guarded(adapter.poolmanager):
        _instrument_adapter(adapter)
    return _send(_plain_send, (adapter, *args), kwargs)


def _send(send: Callable[..., requests.Response], args: Any, kwargs: Any) -> requests.Response:
    # The pool checks as well; but requests 2.28 sends a body of unknown length without asking the pool.
    token = current_token()
    token.check()
    try:
        return send(*args, **kwargs)
    except Exception as error:
        decide(token, error)
        raise


def _instrument_adapter(adapter: HTTPAdapter) -> None:
    with _lock:
        if adapter not in _instrumented:
            _instrumented.add(adapter)
            _guard_adapter(adapter)


class _GuardedProxies(dict[str, Any]):
    """The proxy managers of an adapter, each made cancellable when it is put in."""

    @override
    def __setitem__(self, proxy: str, manager: Any) -> None:
        _guard_if_possible(manager)
        super().__setitem__(proxy, manager)


def _guard_adapter(adapter: HTTPAdapter) -> None:
    _guard_if_possible(adapter.poolmanager)
    if not isinstance(adapter.proxy_manager, _GuardedProxies):
        proxies = _GuardedProxies()
        for proxy, manager in adapter.proxy_manager.items():
            proxies[proxy] = manager
        adapter.proxy_manager = proxies


def _restore_adapter(adapter: HTTPAdapter) -> None:
    for manager in (adapter.poolmanager, *adapter.proxy_manager.values()):
        plain = _plain_classes.pop(manager, None)
        if plain is not None:
            manager.pool_classes_by_scheme = plain
            manager.clear()
    adapter.proxy_manager = dict(adapter.proxy_manager)


# The pool classes that a manager had before, for `uninstrument`.
_plain_classes: weakref.WeakKeyDictionary[urllib3.PoolManager, Any] = weakref.WeakKeyDictionary()


def _guard_if_possible(manager: urllib3.PoolManager) -> None:
    if is_guarded(manager):
        return
    plain = manager.pool_classes_by_scheme
    try:
        guard_manager(manager)
    except TokenScopeError:
        return  # it connects in a way of its own: it works on as if we were not there
    _plain_classes[manager] = plain
