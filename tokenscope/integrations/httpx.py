"""Cancellable httpx: a drop-in `Client`, and a `CancellableTransport` for somebody else's client.

guarded:      waiting for a connection of the pool, name look-up, connect, proxy CONNECT and SOCKS, TLS handshake,
    upload, headers, body, redirects, the pause between connect retries
interrupted:  the canceller shuts the socket down on a duplicate descriptor; the owner looks at its token, raises
    and closes
not:          a user's body generator blocked in next(); HTTP/2 and proxies of scheme https (refused); `AsyncClient`
versions:     httpx >=0.25.2,<1 on httpcore 1
compat:       httpx-0.25.2, httpx-latest
"""

from __future__ import annotations

from tokenscope.integrations._httpx import Body, ClientHooks, Library, Transport
from tokenscope.integrations._missing import needs

with needs("httpx", extra="httpx"):
    import httpcore
    import httpx

__all__ = ["CancellableTransport", "Client"]

_LIBRARY = Library.probed(httpx, httpcore)


class _Body(Body, httpx.SyncByteStream):
    """A response's body."""


class CancellableTransport(Transport, httpx.BaseTransport):
    """`httpx.HTTPTransport` whose requests end with the current token.

    Args:
        token: Ends them as well, besides the current token (never instead of it).

    All other arguments are those of `httpx.HTTPTransport`. In each phase of a request a cancel raises `Cancelled` with
    the token's reason; the library's error that it caused, if any, is its ``__cause__``. The deadline of the token caps
    name look-up, connect, handshake, redirects, retries and body together, where ``timeout=`` limits each wait alone.

    Thread-safe. A streaming response stays bound to the token it was opened under until it is closed, whichever thread
    reads it.

    Raises:
        TypeError: ``token`` is no `CancellationToken`.
        TokenScopeError: ``http2=True``, or a proxy of a scheme other than http, socks5 and socks5h.
    """

    _library = _LIBRARY
    _body = _Body


class Client(ClientHooks, httpx.Client):
    """`httpx.Client` whose requests end with the current token.

    Args:
        token: Ends them as well, besides the current token (never instead of it).

    All other arguments are those of `httpx.Client`, proxies of the environment included. A ``transport`` of your own is
    taken as it is: a cancel does not reach into it, unless it is a `CancellableTransport`.

    Thread-safe as far as `httpx.Client` is.

    Raises:
        TypeError: ``token`` is no `CancellationToken`.
        TokenScopeError: ``http2=True``, a plain ``HTTPTransport``, or a proxy of a scheme other than http, socks5 and
            socks5h.
    """

    _library = _LIBRARY
    _transport_kind = CancellableTransport
