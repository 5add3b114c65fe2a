"""``select.select``, with a wake-up of its own beside the descriptors: a cancel ends the wait."""

from __future__ import annotations

import os
import select as _select
from errno import EBADF
from typing import TYPE_CHECKING, Any

from tokenscope._core import clock
from tokenscope._core import token as tokens
from tokenscope.sync._line import time_left, waiting_token
from tokenscope.waiting import Bell, has_decrypted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenscope._core.token import CancellationToken

__all__ = ["select"]

# What is asked of `poll` for each of the three lists, and what the kernel's `select` counts as ready.
_READ = (_select.POLLIN, _select.POLLIN | _select.POLLHUP | _select.POLLERR)
_WRITE = (_select.POLLOUT, _select.POLLOUT | _select.POLLERR)
_EXCEPTIONAL = (_select.POLLPRI, _select.POLLPRI)


def select(
    rlist: Iterable[Any],
    wlist: Iterable[Any],
    xlist: Iterable[Any],
    timeout: float | None = None,
    *,
    token: CancellationToken | None = None,
) -> tuple[list[Any], list[Any], list[Any]]:
    """Wait until one of the descriptors is ready, as ``select.select``, or this thread is cancelled.

    Nothing is read, written or shut down. A checkpoint; thread-safe. Descriptors above 1023 are fine, and a TLS socket
    that holds bytes it has decrypted already can be read.

    Args:
        rlist: Numbers, or things with a ``fileno()``, to read from.
        wlist: To write to.
        xlist: With an exceptional condition (TCP's urgent data).
        timeout: Seconds to wait at most; 0 only looks; None waits as long as it takes.
        token: Ends the wait too, beside the current token.

    Returns:
        The ready ones of each list; three empty lists if the time was up.

    Raises:
        Cancelled: This thread is, or was meanwhile, cancelled, whether or not something is ready.
        TypeError, ValueError: Something has no ``fileno()``, or is closed; a bad ``timeout`` or ``token``.
        OSError: There is no such descriptor.
    """
    asked = [(_numbered(things), kind) for things, kind in ((rlist, _READ), (wlist, _WRITE), (xlist, _EXCEPTIONAL))]
    listened, end = waiting_token(token), clock.deadline_after(clock.validate_timeout(timeout))
    listened.check()
    decrypted = {number for thing, number in asked[0][0] if has_decrypted(thing)}
    events = _wait(_wanted(asked), listened, clock.now() if decrypted else end)
    if any(event & _select.POLLNVAL for event in events.values()):
        raise OSError(EBADF, os.strerror(EBADF))
    for number in decrypted:
        events[number] = events.get(number, 0) | _select.POLLIN
    reading, writing, exceptional = (
        [thing for thing, number in pairs if events.get(number, 0) & ready] for pairs, (_, ready) in asked
    )
    return reading, writing, exceptional


def _numbered(things: Iterable[Any]) -> list[tuple[Any, int]]:
    return [(thing, _fileno(thing)) for thing in things]


def _fileno(thing: Any) -> int:
    ask = getattr(thing, "fileno", None)
    if ask is None and not isinstance(thing, int):
        raise TypeError(f"select() takes descriptors and things with a fileno(), not {thing!r}")
    number = int(thing if ask is None else ask())
    if number < 0:
        raise ValueError(f"select() was given a descriptor that is closed: {thing!r}")
    return number


def _wanted(asked: list[tuple[list[tuple[Any, int]], tuple[int, int]]]) -> dict[int, int]:
    wanted: dict[int, int] = {}
    for pairs, (mask, _) in asked:
        for _thing, number in pairs:
            wanted[number] = wanted.get(number, 0) | mask
    return wanted


def _wait(wanted: dict[int, int], token: CancellationToken, end: float | None) -> dict[int, int]:
    """The descriptors that are ready, with their events; none if the time was up."""
    with Bell(wanted) as bell:
        tokens.attach(token, bell)
        try:
            while True:
                events = bell.pause(time_left(token, end))
                tokens.expire_if_due(token)
                token.check()
                if events or (end is not None and clock.now() >= end):
                    return events
        finally:
            tokens.detach(token, bell)
