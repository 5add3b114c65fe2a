"""Cancellable anthropic: the calls, streams and retries of ``cancellable(Anthropic(...))`` end with the token.

guarded:      what is guarded of httpx (connect to the last byte of a stream), the pause before a retry
interrupted:  the canceller shuts the socket down, or wakes the pause; the owner looks at its token and raises
not:          AsyncAnthropic (refused), websockets (realtime), HTTP/2
versions:     anthropic >=0.125,<3, on httpx or httpx2; its hooks are checked when this is imported
compat:       anthropic-0.125.0, anthropic-1.0.0, anthropic-latest, tests/integrations/test_anthropic.py
"""

from __future__ import annotations

from typing import TypeVar

from tokenscope.integrations._missing import needs
from tokenscope.integrations._sdk import Vendor

with needs("anthropic", extra="anthropic"):
    import anthropic

__all__ = ["cancellable"]

C = TypeVar("C", bound=anthropic.Anthropic)

_VENDOR = Vendor.probed(anthropic, "Anthropic")


def cancellable(client: C) -> C:
    """Return a client of the same class and settings, whose calls end with the current token.

    Args:
        client: An `anthropic.Anthropic`, or of a subclass. It stays as it was. Close what is
            returned, or use it in a ``with``: it does not close its connections when it is dropped.

    Its copies (``with_options``, ``copy``) are cancellable too. A cancel raises `Cancelled` with the token's reason:
    before the first byte, between two tokens of a stream, in the pause before a retry. No retry follows it. What the
    vendor makes until it sees the closed connection, it may bill.

    Thread-safe as far as the client is. A stream stays bound to the token it was opened under until it is closed.

    Raises:
        TypeError: ``client`` is no `anthropic.Anthropic`.
        TokenScopeError: It has an ``http_client`` whose settings cannot be read: one that is no `Client` of
            `tokenscope.integrations.httpx` or `.httpx2`.
    """
    return _VENDOR.cancellable(client)
