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

import contextlib
from typing import TYPE_CHECKING, Any

from tokenscope._core._typing import override
from tokenscope._core.current import current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._binding import check_token, decide, under
from tokenscope.integrations._missing import needs
from tokenscope.integrations.urllib3 import PATCHES, guard_manager, is_guarded

with needs("requests"):
    import requests
    from requests.adapters import HTTPAdapter

if TYPE_CHECKING:
    from collections.abc import Callable

    import urllib3
    from requests.adapters import BaseAdapter

    from tokenscope._core.token import CancellationToken

__all__ = ["CancellableAdapter", "Session", "instrument", "mount", "uninstrument"]


class CancellableAdapter(HTTPAdapter):
    """`requests.adapters.HTTPAdapter` whose requests end with the current token.

    Args:
        token: Ends them as well, besides the current token (never instead of it). Not pickled with the
            adapter.

    All other arguments are requests' own. In each phase of a request a cancel raises `Cancelled` with the token's
    reason; where the cancel made the transport raise an error, that is its ``__cause__``. The deadline of the token
    caps name look-up, connect, handshake, redirects, retries and body together, where ``timeout=`` limits each wait
    alone.

    Raises:
        TypeError: ``token`` is no `CancellationToken`.
    """

    token: CancellationToken | None = None

    def __init__(self, *args: Any, token: CancellationToken | None = None, **kwargs: Any) -> None:
        check_token(token)
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

    An `HTTPAdapter` that is mounted later (with retries, pool sizes, of a class of your own) is made cancellable as
    by `mount`, and stays so when the session is pickled or copied. An adapter that is no `HTTPAdapter`, or has no
    ``poolmanager`` when it is mounted, is taken as it is: a cancel does not reach into its requests.

    Thread-safe as far as `requests.Session` is. A streaming response stays bound to the token it was opened
    under until it is closed or read to the end, whichever thread reads it.

    Raises:
        TypeError: ``token`` is no `CancellationToken`.
    """

    _token: CancellationToken | None = None  # not among requests' `__attrs__`, so not pickled

    def __init__(self, *, token: CancellationToken | None = None) -> None:
        check_token(token)
        self._token = token
        super().__init__()
        self.mount("https://", CancellableAdapter())
        self.mount("http://", CancellableAdapter())

    @override
    def mount(self, prefix: str, adapter: BaseAdapter) -> None:
        """As requests'; an `HTTPAdapter` is made cancellable, its idle connections are closed."""
        _guard_mounted(adapter)
        super().mount(prefix, adapter)

    @override
    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send one prepared request and follow its redirects, or raise what the token says."""
        if self._token is None:
            return super().send(*args, **kwargs)
        with under(self._token):
            return super().send(*args, **kwargs)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        mount(self)  # a pickled adapter makes itself new pools


def mount(session: requests.Session) -> None:
    """Make the requests of an existing session end with the current token.

    Its adapters stay, with all their settings; their pools are replaced, and idle connections closed.
    Adapters that are no `HTTPAdapter`, and connections to SOCKS proxies, are left as they are. A pickled copy of the
    session is a plain one: mount it again.

    Raises:
        TypeError: It is no `requests.Session`.
    """
    if not isinstance(session, requests.Session):
        raise TypeError(f"session must be a requests.Session, not {session!r}")
    for adapter in session.adapters.values():
        _guard_mounted(adapter)


def instrument() -> None:
    """Make the requests of every session in this process, present and future, end with the current token.

    Sessions of other libraries and ``requests.get(...)`` included. Outside of any scope nothing changes. It works one
    floor below, in urllib3's managers, and so reaches all that goes through them; see
    `tokenscope.integrations.urllib3.instrument`. Nothing of ``requests`` itself is patched: mocks and recorders work as
    before. Idempotent, thread-safe.
    """
    PATCHES.turn_on("requests")


def uninstrument() -> None:
    """Undo `instrument`. Responses that are open stay cancellable until they are closed. Idempotent, thread-safe."""
    PATCHES.turn_off("requests")


def _send(send: Callable[..., requests.Response], args: Any, kwargs: Any) -> requests.Response:
    # The pool checks as well; but requests 2.28 sends a body of unknown length without asking the pool.
    token = current_token()
    token.check()
    try:
        return send(*args, **kwargs)
    except Exception as error:
        decide(token, error)
        raise


class _GuardedProxies(dict[str, Any]):
    """The proxy managers of an adapter, each made cancellable when it is put in."""

    @override
    def __setitem__(self, proxy: str, manager: Any) -> None:
        _guard_if_possible(manager)
        super().__setitem__(proxy, manager)


def _guard_mounted(adapter: BaseAdapter) -> None:
    if isinstance(adapter, HTTPAdapter):
        _guard_adapter(adapter)


def _guard_adapter(adapter: HTTPAdapter) -> None:
    if getattr(adapter, "poolmanager", None) is None:  # one that sends in a way of its own
        return
    _guard_if_possible(adapter.poolmanager)
    if not isinstance(adapter.proxy_manager, _GuardedProxies):
        proxies = _GuardedProxies()
        for proxy, manager in adapter.proxy_manager.items():
            proxies[proxy] = manager
        adapter.proxy_manager = proxies


def _guard_if_possible(manager: urllib3.PoolManager) -> None:
    if is_guarded(manager):
        return
    with contextlib.suppress(TokenScopeError):  # it connects in a way of its own: it works on as if we were not there
        guard_manager(manager)
