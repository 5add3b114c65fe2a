"""Locks and semaphores: so many permits, and a line for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenscope._core import _primitives
from tokenscope._core._typing import override
from tokenscope._core.token import NEVER
from tokenscope.sync._line import NOTHING, Desk, Line, end_of, waiting_token, whole_number

if TYPE_CHECKING:
    from tokenscope._core.token import CancellationToken

__all__ = ["BoundedSemaphore", "Lock", "RLock", "Semaphore"]


class _Permits:
    """What locks and semaphores have in common: a number of permits."""

    def __init__(self, value: int) -> None:
        self._value = value  # permits not taken, promised ones included; under the desk's lock
        self._line = Line()
        self._desk = Desk(self._line)

    def _free(self) -> int:
        return self._value

    def _claim(self) -> bool:
        self._value -= 1; return True  # fmt: skip  # on one line: an interrupt finds both done, or neither

    def _give(self, count: int = 1) -> None:
        self._desk.run(self._give_locked, count)

    def _give_locked(self, count: int) -> None:
        self._value += count
        self._line.serve_locked(self._value)

    def _take(self, token: CancellationToken, end: float | None) -> bool:
        return self._desk.obtain(self._line, self._free, self._claim, self._give, token, end) is not NOTHING

    def _take_now(self) -> bool:
        return self._desk.attempt(self._line, self._free, self._claim, self._give) is not NOTHING

    def acquire(self) -> bool:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class _Mutex(_Permits):
    """What the two locks have in common: one permit."""

    def __init__(self) -> None:
        super().__init__(1)

    def locked(self) -> bool:
        """Whether it is taken (or promised to a thread that waits)."""
        return self._value <= len(self._line.granted)


class Lock(_Mutex):
    """`threading.Lock`, in which a cancel ends the wait. Fair: first come, first served.

    Thread-safe. ``with lock:`` is a checkpoint; a `Cancelled` raised there leaves the lock as it was. `release` may be
    called by signal handlers and finalizers; acquiring there is refused if it would wait for the thread's own step.
    """

    @override
    def acquire(
        self, blocking: bool = True, timeout: float | None = -1, *, token: CancellationToken | None = None
    ) -> bool:
        """Take the lock; True if it was taken.

        Args:
            blocking: Whether to wait. If not, this is no checkpoint.
            timeout: Seconds to wait at most; -1 and None are no limit.
            token: Ends the wait too, beside the current token.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled. The lock is not taken.
            ValueError, TypeError: A bad ``timeout`` or ``token``; a ``timeout`` without ``blocking``.
        """
        end = _end_of_acquire(blocking, timeout)
        return self._take(waiting_token(token), end) if blocking else self._take_now()

    @override
    def release(self) -> None:
        """Let the lock go; the thread that has waited longest gets it. Any thread may do that. Never blocks.

        Raises:
            RuntimeError: It is not taken.
        """
        self._give()

    @override
    def _give_locked(self, count: int) -> None:
        if self._value:
            raise RuntimeError("release unlocked lock")
        super()._give_locked(count)

    def __repr__(self) -> str:
        return f"<{'locked' if self.locked() else 'unlocked'} tokenscope.sync.Lock object at {id(self):#x}>"

    # What a condition asks of its lock, ours and `threading.Condition`.

    def _is_owned(self) -> bool:
        return not self._value

    def _release_save(self) -> None:
        self.release()

    def _acquire_restore(self, _saved: object) -> None:
        """Take the lock back after a wait. No cancel ends this: whoever waits expects to hold it afterwards."""
        self._take(NEVER, None)


class RLock(_Mutex):
    """`threading.RLock`, in which a cancel ends the wait. Fair: first come, first served. As `Lock` in all else."""

    def __init__(self) -> None:
        super().__init__()
        self._owner: int | None = None  # the thread; under the desk's lock, and only its own thread finds itself here
        self._count = 0  # of the owner's

    @override
    def acquire(
        self, blocking: bool = True, timeout: float | None = -1, *, token: CancellationToken | None = None
    ) -> bool:
        """Take the lock, or once more if this thread has it; as `Lock.acquire`, a checkpoint in both cases."""
        end = _end_of_acquire(blocking, timeout)
        listened = waiting_token(token) if blocking else NEVER
        if self._is_owned():
            listened.check()
            self._count += 1
            return True
        return self._take(listened, end) if blocking else self._take_now()

    @override
    def _claim(self) -> bool:
        me = _primitives.get_ident()
        self._owner, self._count, self._value = me, 1, 0; return True  # fmt: skip  # one line, as above

    @override
    def release(self) -> None:
        """Let the lock go once.

        Raises:
            RuntimeError: It is not this thread's.
        """
        if not self._is_owned():
            raise RuntimeError("cannot release un-acquired lock")
        if self._count > 1:
            self._count -= 1
        else:
            self._give()

    @override
    def _give_locked(self, count: int) -> None:
        self._owner, self._count = None, 0
        super()._give_locked(count)

    def __repr__(self) -> str:
        state = "locked" if self.locked() else "unlocked"
        return f"<{state} tokenscope.sync.RLock object owner={self._owner} count={self._count} at {id(self):#x}>"

    def _is_owned(self) -> bool:
        return self._owner == _primitives.get_ident()

    def _recursion_count(self) -> int:
        return self._count if self._is_owned() else 0

    def _release_save(self) -> int:
        count = self._recursion_count()
        if not count:
            raise RuntimeError("cannot release un-acquired lock")
        self._give()
        return count

    def _acquire_restore(self, saved: int) -> None:
        """Take the lock back after a wait, so many times as before. No cancel ends this."""
        self._take(NEVER, None)
        self._count = saved


class Semaphore(_Permits):
    """`threading.Semaphore`, in which a cancel ends the wait. Fair: first come, first served.

    Thread-safe; `release` may be called by signal handlers and finalizers.

    Raises:
        ValueError, TypeError: ``value`` is negative, or no int.
    """

    def __init__(self, value: int = 1) -> None:
        super().__init__(whole_number("value", value, least=0))

    @override
    def acquire(
        self, blocking: bool = True, timeout: float | None = None, *, token: CancellationToken | None = None
    ) -> bool:
        """Take a permit; True if one was taken.

        Args:
            blocking: Whether to wait. If not, this is no checkpoint.
            timeout: Seconds to wait at most.
            token: Ends the wait too, beside the current token.

        Raises:
            Cancelled: This thread is, or was meanwhile, cancelled. No permit is taken.
            ValueError, TypeError: A bad ``timeout`` or ``token``; a ``timeout`` without ``blocking``.
        """
        if not blocking:
            if timeout is not None:
                raise ValueError("can't specify timeout for non-blocking acquire")
            return self._take_now()
        return self._take(waiting_token(token), end_of(timeout))

    @override
    def release(self, n: int = 1) -> None:
        """Give back ``n`` permits; those who have waited longest get them. Never blocks.

        Raises:
            ValueError, TypeError: ``n`` is less than 1, or no int.
        """
        self._give(whole_number("n", n, least=1))

    def __repr__(self) -> str:
        return f"<tokenscope.sync.{type(self).__name__} at {id(self):#x}: value={self._value}>"


class BoundedSemaphore(Semaphore):
    """`threading.BoundedSemaphore`: a `Semaphore` that refuses more permits than it began with."""

    def __init__(self, value: int = 1) -> None:
        super().__init__(value)
        self._initial_value = value

    @override
    def _give_locked(self, count: int) -> None:
        if self._value + count > self._initial_value:
            raise ValueError("Semaphore released too many times")
        super()._give_locked(count)


def _end_of_acquire(blocking: bool, timeout: float | None) -> float | None:
    """When `Lock.acquire` gives up; stricter than the others, as in ``threading``."""
    if timeout is None or timeout == -1:
        return None
    if not blocking:
        raise ValueError("can't specify a timeout for a non-blocking call")
    end = end_of(timeout)
    if timeout < 0:
        raise ValueError(f"timeout must be -1, None, or 0 or more seconds, not {timeout!r}")
    return end
