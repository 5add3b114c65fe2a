"""The queue of a connection pool, in which a cancel ends the wait for a free slot."""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from typing import Any

from tokenscope._core import _primitives, clock
from tokenscope._core import token as tokens
from tokenscope._core._typing import override
from tokenscope._core.current import current_token

__all__ = ["SlotQueue"]


class SlotQueue(queue.LifoQueue[Any]):
    """A `queue.LifoQueue` whose `get` also ends when the current token is cancelled.

    `queue.Queue` itself waits on a condition; to wake that, a canceller would need its mutex, which a thread
    interrupted by a signal handler (the canceller) may hold. So whoever waits here has a waiter of its own,
    which can be woken from anywhere.

    Invariant: if the queue is not empty and somebody waits, then at least one of the waiting has been woken.
        `put` wakes one; who was woken and leaves without need of it wakes the next.
    """

    def __init__(self, maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self._waiting: deque[_primitives.Waiter] = deque()  # changed by atomic operations

    @property
    def waiting(self) -> int:
        """How many threads wait for a slot."""
        return len(self._waiting)

    @override
    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._wake_one()

    @override
    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the newest item.

        Raises:
            queue.Empty: There is none: at once if not ``block``, else because the time is up or the current
            token is
                cancelled. Look at the token.
        """
        try:
            return super().get(block=False)
        except queue.Empty:
            if not block:
                raise
        return self._wait(current_token(), None if timeout is None else clock.now() + timeout)

    def _wait(self, token: tokens.CancellationToken, end: float | None) -> Any:
        waiter = _primitives.Waiter()
        try:
            while tokens.attach(token, waiter) and (end is None or clock.now() < end):
                self._waiting.append(waiter)
                try:
                    return super().get(block=False)  # registered, now look again
                except queue.Empty:
                    waiter.wait(_time_left(token, end))
                self._forget(waiter)
                tokens.expire_if_due(token)
        finally:
            tokens.detach(token, waiter)
            if not self._forget(waiter) and not self.empty():
                self._wake_one()  # it was perhaps our turn, and we have not taken this item
        raise queue.Empty

    def _forget(self, waiter: _primitives.Waiter) -> bool:
        """Take it off the list; False if somebody woke it (or it was off already)."""
        try:
            self._waiting.remove(waiter)
        except ValueError:
            return False
        return True

    def _wake_one(self) -> None:
        if not self._waiting:
            return
        with contextlib.suppress(IndexError):  # somebody else took the last one
            self._waiting.popleft().wake()


def _time_left(token: tokens.CancellationToken, end: float | None) -> float | None:
    times = [token.remaining(), None if end is None else end - clock.now()]
    return min((seconds for seconds in times if seconds is not None), default=None)
