"""Which token a request works for: looked up once, at checkout, and kept until the response is done.

A response may be read by another thread than the one that sent the request; it stays bound to the token it
was opened under.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from tokenscope._core import token as tokens
from tokenscope._core.current import current_token, standing_back, use_token

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenscope._core.token import CancellationToken

__all__ = ["Binding", "check_token", "decide", "under"]

# The token that `under` made current: the user named it (or a parent of it) himself.
_named: ContextVar[CancellationToken | None] = ContextVar("tokenscope_named_token", default=None)


class Binding(NamedTuple):
    """A token, and whether the user named it for this client (`Guard.attach`)."""

    token: CancellationToken
    explicit: bool

    @classmethod
    def here(cls) -> Binding:
        """What a request that starts now works for."""
        token = current_token()
        return cls(token, token is _named.get())


@contextlib.contextmanager
def under(explicit: CancellationToken | None) -> Iterator[None]:
    """Add a client's own token to the current one, but not in a section that must not be cut."""
    if explicit is None or standing_back():
        yield
        return
    before = _named.get()
    with use_token(explicit) as both:
        _named.set(both)
        try:
            yield
        finally:
            _named.set(before)


def check_token(token: object) -> None:
    """Refuse what cannot be a client's own token, when it is given and not with the first request.

    Raises:
        TypeError: It is neither a `CancellationToken` nor None.
    """
    if token is not None and not isinstance(token, tokens.CancellationToken):
        raise TypeError(f"token must be a CancellationToken or None, not {token!r}")


def decide(token: CancellationToken, failure: Exception) -> None:
    """Look at the token after a failure: under a cancelled one every failure is the cancel's doing.

    Raises:
        Cancelled: The token is cancelled; the failure is the ``__cause__``.
    """
    tokens.expire_if_due(token)
    tokens.raise_if_cancelled(token, failure)
