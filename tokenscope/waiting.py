"""Waiting for the first of several things, without asking again and again.

Each thing tells one wake-up that belongs to this call. Without sockets that is a plain waiter; with sockets it is a
`Bell`, a descriptor in the same ``poll`` as they are.

Invariant: registered first, then looked, and looked again after each wake-up. So a wake-up may be early or superfluous,
and is never the only sign of anything; what is ready is decided by looking alone.
"""

from __future__ import annotations

import math
import select
import socket
from typing import TYPE_CHECKING, Any, Self

from tokenscope._core import _primitives, clock
from tokenscope._core import token as tokens
from tokenscope._core.task import Task
from tokenscope._core.token import CancellationToken
from tokenscope.sync import Event, Queue, SimpleQueue
from tokenscope.sync._line import time_left, waiting_token

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Bell", "has_decrypted", "wait_any"]

#: The longest that one ``poll`` is asked to take, in seconds: it counts milliseconds in a C int.
_LONGEST_POLL = 86_400.0


def wait_any(*things: Any, timeout: float | None = None, token: CancellationToken | None = None) -> list[Any]:
    """Wait until at least one of the things is ready, and return all that are, in the order given.

    Nothing is taken and nothing is changed: what was ready stays so, until somebody uses it. Another thread may be
    faster; so take without waiting (``get_nowait``), and come back if there is nothing. A checkpoint; thread-safe.

    Args:
        things: Any mixture of these, at least one. A `CancellationToken` is ready once it is cancelled, a `Task` once
            it is done, a ``sync.Event`` while it is set, a queue of ``tokenscope.sync`` while ``get`` would not wait, a
            socket (or what else has a ``fileno()`` that can be polled) while reading from it would not wait, the end
            and errors included.
        timeout: Seconds to wait at most; 0 only looks.
        token: Ends the wait too, beside the current token.

    Returns:
        The ready ones; an empty list if the time was up.

    Raises:
        Cancelled: This thread is, or was meanwhile, cancelled, whether or not something is ready.
        TypeError: Nothing was given, or something that is none of these; a bad ``timeout`` or ``token``.
        ValueError: A bad ``timeout``; a socket that is closed.
    """
    listened, end = waiting_token(token), clock.deadline_after(clock.validate_timeout(timeout))
    sockets = _filenos(things)
    listened.check()
    with Bell(dict.fromkeys(sockets.values(), select.POLLIN)) if sockets else _Doorman() as bell:
        return _Wait(things, sockets, listened, bell).until(end)


def _filenos(things: tuple[Any, ...]) -> dict[int, int]:
    """The descriptors among the things, by position.

    Raises:
        TypeError, ValueError: As `wait_any`.
    """
    if not things:
        raise TypeError("wait_any() needs something to wait for")
    return {
        position: _fileno(thing)
        for position, thing in enumerate(things)
        if not isinstance(thing, CancellationToken | Task | Event | Queue | SimpleQueue)
    }


def _fileno(thing: Any) -> int:
    ask = getattr(thing, "fileno", None)
    if ask is None:
        raise TypeError(
            f"wait_any() takes tokens, tasks, sockets, and the events and queues of tokenscope.sync, not {thing!r}"
        )
    number = int(ask())
    if number < 0:
        raise ValueError(f"wait_any() was given a socket that is closed: {thing!r}")
    return number


class _Doorman(_primitives.Waiter):
    """The wake-up of a wait without sockets."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pause(self, seconds: float | None) -> dict[int, int]:
        """Block until woken; no descriptor is ever ready."""
        self.wait(seconds)
        return {}


class Bell:
    """A wake-up that ``poll`` hears, together with other descriptors: those in ``wanted``, each with its events.

    ``poll`` needs no descriptor of its own (epoll does) and takes any number (select does not).

    Why the lock: a `wake` may still be running on another thread when the wait is over, and must not write to a number
    that is somebody else's file by then. It only *tries* the lock, as it may be in a signal handler; who holds the
    lock looks at the marks after letting go (`_settle`).
    """

    def __init__(self, wanted: Mapping[int, int]) -> None:
        self._lock = _primitives.Lock()
        self._rung = False  # a mark: somebody called `wake`
        self._sent = False  # under the lock: a byte is on its way
        self._over = False  # a mark: the wait has ended
        self._ear, self._mouth = socket.socketpair()
        self._poll = select.poll()
        self._poll.register(self._ear, select.POLLIN)
        for fileno, events in wanted.items():
            self._poll.register(fileno, events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._settle()

    def wake(self) -> None:
        """Let the owner go on. Never blocks; safe in signal handlers and finalizers."""
        self._rung = True
        self._settle()

    def _settle(self) -> None:
        while self._wants() and self._lock.acquire(blocking=False):
            try:
                self._settle_locked()
            finally:
                self._lock.release()

    def _wants(self) -> bool:
        return self._mouth.fileno() >= 0 and (self._over or (self._rung and not self._sent))

    def _settle_locked(self) -> None:
        if self._over:
            self._ear.close()
            self._mouth.close()
        elif self._rung and not self._sent:
            self._sent = True
            self._mouth.send(b"!")  # one byte at a time is under way: this never blocks

    def pause(self, seconds: float | None) -> dict[int, int]:
        """Block until woken or until a descriptor is ready; those that are, each with its events."""
        longest = _LONGEST_POLL if seconds is None else min(seconds, _LONGEST_POLL)
        ready = dict(self._poll.poll(math.ceil(longest * 1000)))
        if ready.pop(self._ear.fileno(), 0):
            with self._lock: self._hear_locked()  # fmt: skip
        return ready

    def _hear_locked(self) -> None:
        # Whoever rings between these lines rings for something that the owner is going to look at now.
        self._ear.recv(1)
        self._rung = self._sent = False


class _Wait:
    """One call: what it waits for, and what wakes it. The private parts of tasks and primitives it uses are for it."""

    def __init__(
        self,
        things: tuple[Any, ...],
        sockets: dict[int, int],
        token: CancellationToken,
        bell: _Doorman | Bell,
    ) -> None:
        self._things = things
        self._sockets = sockets
        self._token = token
        self._bell = bell

    def until(self, end: float | None) -> list[Any]:
        """Wait; what is ready, or nothing if the time was up."""
        try:
            self._register()
            return self._look_and_wait(end)
        finally:
            self._unregister()

    def _look_and_wait(self, end: float | None) -> list[Any]:
        filenos: dict[int, int] = {}
        if self._sockets:
            filenos = self._bell.pause(0)
        while True:
            for token in self._tokens():
                tokens.expire_if_due(token)
            self._token.check()
            ready = [thing for at, thing in enumerate(self._things) if self._is_ready(at, thing, filenos)]
            left = self._time_left(end)
            if ready or (end is not None and clock.now() >= end):
                return ready
            filenos = self._bell.pause(left)

    def _is_ready(self, position: int, thing: Any, filenos: dict[int, int]) -> bool:
        if position in self._sockets:
            return self._sockets[position] in filenos or has_decrypted(thing)
        if isinstance(thing, CancellationToken):
            return thing.cancelled
        if isinstance(thing, Task):
            return thing.done()
        return bool(thing._is_ready())  # noqa: SLF001

    def _time_left(self, end: float | None) -> float | None:
        limits = [time_left(token, end) for token in self._tokens()]
        return min((seconds for seconds in limits if seconds is not None), default=None)

    def _tokens(self) -> set[CancellationToken]:
        return {self._token, *(thing for thing in self._things if isinstance(thing, CancellationToken))}

    def _register(self) -> None:
        for token in self._tokens():
            tokens.attach(token, self._bell)
        for thing in self._watched():
            thing._watchers.append(self._bell)  # noqa: SLF001

    def _unregister(self) -> None:
        for token in self._tokens():
            tokens.detach(token, self._bell)
        for thing in self._watched():
            _primitives.discard(thing._watchers, self._bell)  # noqa: SLF001

    def _watched(self) -> list[Any]:
        """The tasks and primitives: each has a list of those to wake."""
        return [
            thing
            for at, thing in enumerate(self._things)
            if at not in self._sockets and not isinstance(thing, CancellationToken)
        ]


def has_decrypted(sock: Any) -> bool:
    """Whether a TLS socket holds bytes that were read from the wire already: ``poll`` does not know of them."""
    pending = getattr(sock, "pending", None)
    return pending is not None and pending() > 0
