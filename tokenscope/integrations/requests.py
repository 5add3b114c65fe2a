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
from typing import TYPE_CHECKING, Any, cast

from tokenscope._core._typing import override
from tokenscope._core.current import current_token
from tokenscope._core.errors import TokenScopeError
from tokenscope.integrations._missing import needs
from tokenscope.integrations._urllib3_binding import check_token, decide, under
from tokenscope.integrations.urllib3 import guard_manager, is_guarded

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
    by `mount`, and stays so when the session is pickled or copied. An adapter that is no `HTTPAdapter` is taken as
    it is: a cancel does not reach into its requests.

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

    Sessions of other libraries and ``requests.get(...)`` included. Outside any scope nothing changes.
    Idempotent. What others put in place of ``HTTPAdapter.send`` (a mock, a recorder) is called as before.
    """
    with _lock:
        hook = _hook_in_place()
        if hook is None:
            hook = _Hook(vars(HTTPAdapter)["send"])
            HTTPAdapter.send = hook.send  # type: ignore[method-assign, assignment]
        hook.on = True
        _hooks.add(hook)


def uninstrument() -> None:
    """Undo `instrument`. Responses that are open stay cancellable until they are closed. Idempotent.

    What others have put in place of ``HTTPAdapter.send`` since stays; if they put ours back one day, it does
    nothing but call what was there before it.
    """
    with _lock:
        for hook in _hooks:
            hook.on = False
        _hooks.clear()
        while (ours := _hook_in_place()) is not None:
            HTTPAdapter.send = ours.around  # type: ignore[method-assign]
        for adapter in list(_instrumented):
            _restore_adapter(adapter)
        _instrumented.clear()


class _Hook:
    """Our ``HTTPAdapter.send``, around whatever was there.

    Others patch the same name, before us and after us, and put back what they found whenever they like: so
    each hook remembers its own neighbour, and one that cannot be taken away is switched off.
    """

    def __init__(self, around: Any) -> None:
        self.on = False
        self.around = around  # as it stood in the class: perhaps a function, perhaps a mock

        def send(adapter: HTTPAdapter, *args: Any, **kwargs: Any) -> requests.Response:
            inner = _bound(around, adapter)
            if not self.on:
                return inner(*args, **kwargs)
            if not is_guarded(adapter.poolmanager):
                _instrument_adapter(self, adapter)
            return _send(inner, args, kwargs)

        self.send = send
        send.hook = self  # type: ignore[attr-defined]


def _hook_in_place() -> _Hook | None:
    send = vars(HTTPAdapter)["send"]
    hook = getattr(send, "hook", None)  # a mock has every attribute, and `functools.wraps` copies ours
    return hook if isinstance(hook, _Hook) and hook.send is send else None


def _bound(send: Any, adapter: HTTPAdapter) -> Callable[..., requests.Response]:
    """What ``adapter.send`` would be: a function is bound to the adapter, a mock is not."""
    bind = getattr(type(send), "__get__", None)
    return cast("Callable[..., requests.Response]", send if bind is None else bind(send, adapter, type(adapter)))


_lock = threading.Lock()
_hooks: set[_Hook] = set()  # those that are on; changed under the lock
# Adapters that only `instrument` has changed; changed under the lock.
_instrumented: weakref.WeakSet[HTTPAdapter] = weakref.WeakSet()


def _send(send: Callable[..., requests.Response], args: Any, kwargs: Any) -> requests.Response:
    # The pool checks as well; but requests 2.28 sends a body of unknown length without asking the pool.
    token = current_token()
    token.check()
    try:
        return send(*args, **kwargs)
    except Exception as error:
        decide(token, error)
        raise


def _instrument_adapter(hook: _Hook, adapter: HTTPAdapter) -> None:
    with _lock:
        if hook.on and adapter not in _instrumented:
            _instrumented.add(adapter)
            _guard_adapter(adapter)


class _GuardedProxies(dict[str, Any]):
    """The proxy managers of an adapter, each made cancellable when it is put in."""

    @override
    def __setitem__(self, proxy: str, manager: Any) -> None:
        _guard_if_possible(manager)
        super().__setitem__(proxy, manager)


def _guard_mounted(adapter: BaseAdapter) -> None:
    if isinstance(adapter, HTTPAdapter):
        _instrumented.discard(adapter)  # `uninstrument` is not to undo it
        _guard_adapter(adapter)


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
