"""Cancellable urllib3: `PoolManager`, `ProxyManager`; `guard_manager` for somebody else's, `instrument` for all.

guarded:      waiting for a pool slot, name look-up, connect, proxy CONNECT, TLS handshake, upload, headers,
    body, retry pauses
interrupted:  the canceller shuts the socket down on a duplicate descriptor; the owner looks at its token,
    raises and closes
not:          a user's body generator blocked in next(); SOCKS and HTTP/2 (refused, by `instrument` left alone); the
    abandoned look-up itself (64 at most)
versions:     urllib3 >=1.26,<3
compat:       urllib3-1.26.20, urllib3-2.0.7, urllib3-latest
"""

from __future__ import annotations

from typing import Any

from tokenscope.integrations._missing import needs
from tokenscope.integrations._urllib3_hooks import check_hooks

with needs("urllib3"):
    import urllib3

check_hooks()

# ruff: noqa: E402 - nothing is built on hooks that were not checked
from tokenscope.integrations._urllib3_everywhere import PATCHES
from tokenscope.integrations._urllib3_pool import guard_manager, is_guarded
from tokenscope.integrations._urllib3_retry import CancellableRetry

__all__ = [
    "PATCHES",
    "CancellableRetry",
    "PoolManager",
    "ProxyManager",
    "guard_manager",
    "instrument",
    "is_guarded",
    "uninstrument",
]


class PoolManager(urllib3.PoolManager):
    """`urllib3.PoolManager` whose requests end with the current token.

    A response stays bound to the token its request was sent under until it is closed or read to the end,
    whoever reads it. All arguments are urllib3's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        guard_manager(self)


class ProxyManager(urllib3.ProxyManager):
    """`urllib3.ProxyManager` whose requests end with the current token; see `PoolManager`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        guard_manager(self)


def instrument() -> None:
    """Make the requests of every `urllib3.PoolManager` in this process, present and future, end with the current token.

    Those of `urllib3.request`, of ``requests`` and of other libraries included. Under a token a request is served
    from pools of its own, which its manager gets beside those it has; outside of any scope nothing changes. A manager
    that connects in a way of its own (SOCKS) is left alone, and named in the log once. Idempotent, thread-safe.
    """
    PATCHES.turn_on("urllib3")


def uninstrument() -> None:
    """Undo `instrument`. Responses that are open stay cancellable until they are closed. Idempotent, thread-safe.

    What others have put in place of a patched attribute since stays, and the log says so; ours below it does nothing.
    """
    PATCHES.turn_off("urllib3")
