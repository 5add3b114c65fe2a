"""Conditions, events and barriers: threads that wait until another one says so."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from tokenscope._core import _primitives, clock
from tokenscope._core._typing import override
from tokenscope._core.current import use_token
from tokenscope._core.errors import Cancelled
from tokenscope.sync._line import NOTHING, Desk, Line, end_of, waiting_token, whole_number
from tokenscope.sync._locks import RLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenscope._core.token import CancellationToken

__all__ = ["Barrier", "Condition", "Event"]

T = TypeVar("T")


class Condition:
    """`threading.Condition`, in which a cancel ends the wait, once the lock is held again.

    Thread-safe. First come, first notified. A notification that reaches a thread in the moment of its cancel goes on to
    the next.

    Args:
        lock: A lock of this package or of ``threading``; an `RLock` of its own by default. ``with condition:`` is a
            checkpoint if taking the lock is.

    Raises:
        TypeError: ``lock`` is none.
    """

    def __init__(self, lock: Any = None) -> None:
        if lock is not None and not (hasattr(lock, "acquire") and hasattr(lock, "release")):
            raise TypeError(f"lock must have acquire() and release(), not {lock!r}")
        self._lock = lock = RLock() if lock is None else lock
        self._line = Line()
        self._desk = Desk(self._line)
        self.acquire = lock.acquire
        self.release = lock.release

    def __enter__(self) -> bool:
        return bool(self._lock.__enter__())

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(*error)

    def __repr__(self) -> str:
        return f"<tokenscope.sync.Condition({self._lock!r}, {len(self._line.turns)})>"

    def wait(self, timeout: float | None = None, *, token: CancellationToken | None = None) -> bool:
        """Let go of the lock, wait to be notified, take the lock again.

        Args:
            timeout: Seconds to wait at most. Taking the lock again may take longer.
            token: Ends the wait too, beside the current token.

        Returns:
            False if the time was up.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled. It holds the lock: taking that again is out of reach
                of any cancel, since what comes after expects to hold it.
            RuntimeError: This thread does not hold the lock.
            ValueError, TypeError: A bad ``timeout`` or ``token``.
        """
        listened, end = waiting_token(token), end_of(timeout)
        if not self._is_owned():
            raise RuntimeError("cannot wait on un-acquired lock")
        listened.check()
        self._desk.refuse_reentry()
        turn, notified = _primitives.Waiter(), False
        try:
            self._desk.run(self._line.turns.setdefault, turn)
            notified = self._wait_unlocked(turn, listened, end)
            listened.check()
        except BaseException:
            if notified or self._leave(turn):
                self._desk.run(self._notify_locked, 1)
            raise
        return notified

    def _wait_unlocked(self, turn: _primitives.Waiter, token: CancellationToken, end: float | None) -> bool:
        """Wait without the lock; whether a notification came."""
        saved = self._release_save()
        try:
            self._desk.sleep(self._line, turn, token, end)
            return self._leave(turn)
        finally:
            self._acquire_restore(saved)

    def _leave(self, turn: _primitives.Waiter) -> bool:
        return self._desk.ask(self._line.leave_locked, turn)

    def wait_for(
        self, predicate: Callable[[], T], timeout: float | None = None, *, token: CancellationToken | None = None
    ) -> T:
        """Wait until ``predicate()`` is true; its last answer, a false one if the time was up. Raises as `wait`."""
        if not callable(predicate):
            raise TypeError(f"predicate must be callable, not {predicate!r}")
        waiting_token(token).check()
        end = end_of(timeout)
        while not (answer := predicate()):
            left = None if end is None else end - clock.now()
            if left is not None and left <= 0:
                break
            self.wait(left, token=token)
        return answer

    def notify(self, n: int = 1) -> None:
        """Wake up to ``n`` of those who wait, the oldest first. Never blocks.

        Raises:
            RuntimeError: This thread does not hold the lock.
            ValueError, TypeError: ``n`` is negative, or no int.
        """
        number = whole_number("n", n, least=0)
        if not self._is_owned():
            raise RuntimeError("cannot notify on un-acquired lock")
        self._desk.run(self._notify_locked, number)

    def _notify_locked(self, n: int) -> None:
        # Turns are granted one by one here, not for units of something that is there: a notification is not kept.
        for turn in self._line.first(n):
            self._line.granted.add(turn)
            turn.wake()
            self._line.turns.pop(turn, None)

    def notify_all(self) -> None:
        """Wake all who wait. Raises as `notify`."""
        self.notify(len(self._line.turns))

    # What is asked of the lock, in the words that `threading.Condition` uses for it.

    def _is_owned(self) -> bool:
        ask = getattr(self._lock, "_is_owned", None)
        if ask is not None:
            return bool(ask())
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return False
        return True

    def _release_save(self) -> Any:
        save = getattr(self._lock, "_release_save", None)
        return self._lock.release() if save is None else save()

    def _acquire_restore(self, saved: Any) -> None:
        restore = getattr(self._lock, "_acquire_restore", None)
        if restore is None:
            self._lock.acquire()
        else:
            restore(saved)


class Event:
    """`threading.Event`, in which a cancel ends the wait.

    Thread-safe; `set` and `clear` may be called by signal handlers and finalizers.
    """

    def __init__(self) -> None:
        self._flag = False
        self._line = Line()
        self._watchers = self._line.watchers  # for `tokenscope.wait_any`
        self._desk = Desk(self._line)

    def __repr__(self) -> str:
        return f"<tokenscope.sync.Event at {id(self):#x}: {'set' if self._flag else 'unset'}>"

    def is_set(self) -> bool:
        """Whether it is set."""
        return self._flag

    def set(self) -> None:
        """Set it, and wake all who wait, even if it is cleared right after. Never blocks."""
        self._flag = True  # at once, also where the rest is put off
        self._desk.run(self._set_locked)

    def _set_locked(self) -> None:
        self._flag = True
        self._line.serve_locked(math.inf)

    def clear(self) -> None:
        """Unset it. Never blocks."""
        self._desk.run(self._clear_locked)

    def _clear_locked(self) -> None:
        self._flag = False

    def _free(self) -> float:
        return math.inf if self._flag else 0

    def wait(self, timeout: float | None = None, *, token: CancellationToken | None = None) -> bool:
        """Wait until it is set; False if the time was up.

        Args:
            timeout: Seconds to wait at most.
            token: Ends the wait too, beside the current token.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled, whether or not the event is set.
            ValueError, TypeError: A bad ``timeout`` or ``token``.
        """
        listened, end = waiting_token(token), end_of(timeout)
        return self._desk.obtain(self._line, self._free, _took, _gave, listened, end) is not NOTHING

    def _is_ready(self) -> bool:
        return self._flag


def _took() -> bool:
    """Take nothing: an event stays set for all."""
    return True


def _gave() -> None:
    """Nothing was taken."""


class Barrier(threading.Barrier):
    """`threading.Barrier`, in which a cancel ends the wait, and breaks the barrier as a timeout does.

    The other parties get a ``BrokenBarrierError``: they would wait for somebody who does not come any more.
    Thread-safe.

    Args:
        parties: How many threads it takes.
        action: Called by one of them when all have come.
        timeout: The default for `wait`, in seconds.

    Raises:
        ValueError, TypeError: ``parties`` is no int of 1 or more; ``action`` is not callable; a bad ``timeout``.
    """

    def __init__(self, parties: int, action: Callable[[], None] | None = None, timeout: float | None = None) -> None:
        if action is not None and not callable(action):
            raise TypeError(f"action must be callable or None, not {action!r}")
        end_of(timeout)  # a bad one is told here, and not by those who wait
        super().__init__(whole_number("parties", parties, least=1), action, timeout)
        # The algorithm is the standard library's; only what it waits on is ours. A plain lock inside: it is held for
        # moments, and `abort` must not be a checkpoint.
        self._cond: Any = Condition(threading.Lock())

    @override
    def wait(self, timeout: float | None = None, *, token: CancellationToken | None = None) -> int:
        """Wait until all parties are here; a different number from 0 on for each of them.

        Args:
            timeout: Seconds to wait at most; then the barrier is broken.
            token: Ends the wait too, beside the current token.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled. If it had come to the barrier, that is broken.
            BrokenBarrierError: The barrier is or was broken or reset, or the time was up.
            TypeError: A bad ``token``.
        """
        listened = waiting_token(token)
        listened.check()
        with nullcontext() if token is None else use_token(listened):
            return super().wait(timeout)

    def _wait(self, timeout: float | None) -> None:
        """Wait for the others: the standard library's own step, called with the lock held."""
        try:
            super()._wait(timeout)  # type: ignore[misc]
        except Cancelled:
            if not self._state:  # type: ignore[attr-defined]  # 0: still filling
                self._break()  # type: ignore[attr-defined]
            raise
