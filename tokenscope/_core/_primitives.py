"""The one door to locks, queues and threads.

Every module of the core takes its primitives from here, by attribute and at the time of use
(``_primitives.Lock()``), so that the race tests can put a deterministic scheduler in their place.
"""

from __future__ import annotations

import _thread
import functools
import queue
import sys
import threading
from collections import deque
from os import getpid
from threading import get_ident
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

__all__ = [
    "MAX_WAIT",
    "Lock",
    "RLock",
    "Room",
    "SimpleQueue",
    "Waiter",
    "discard",
    "get_ident",
    "getpid",
    "is_held",
    "is_owned",
    "is_section",
    "stack_here",
    "start_raw_thread",
    "start_thread",
]

Lock = threading.Lock
RLock = threading.RLock
SimpleQueue = queue.SimpleQueue

#: The longest wait a lock takes, in seconds (about 292 years).
MAX_WAIT = threading.TIMEOUT_MAX


def start_thread(target: Callable[[], object], name: str) -> threading.Thread:
    """Start a daemon thread.

    Raises:
        RuntimeError: The system has no thread to give.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


def start_raw_thread(target: Callable[[Any], object], argument: object) -> None:
    """Start a thread without the bookkeeping (and the locks) of `threading`: for finalizers.

    Raises:
        RuntimeError: The system has no thread to give, or the interpreter is ending.
    """
    _thread.start_new_thread(target, (argument,))


def is_owned(lock: Any) -> bool:
    """Tell whether this thread holds the re-entrant ``lock``.

    ``_is_owned`` is what ``threading.Condition`` itself asks of an ``RLock``; it is exact, where a field
    of our own beside the lock could be left stale by a KeyboardInterrupt.
    """
    return bool(lock._is_owned())


def is_held(lock: Any) -> bool:
    """Tell whether any thread holds the re-entrant ``lock``."""
    if _KNOWS_LOCKED:
        return bool(lock.locked())
    return repr(lock).startswith("<locked")  # all there is before Python 3.14


_KNOWS_LOCKED = hasattr(RLock(), "locked")


def stack_here() -> Iterator[FrameType]:
    """The frames of this thread, innermost first.

    A stack cannot be left stale by an interrupt, as a counter of ours could.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_section(frame: FrameType) -> bool:
    """Whether the frame is, or contains, a locked section of the library's: they are called ``..._locked``."""
    module = str(frame.f_globals.get("__name__", ""))
    return frame.f_code.co_name.endswith("_locked") and module.startswith("tokenscope.")


def discard(pile: Any, item: object) -> None:
    """Remove ``item`` from a list or deque if it is there."""
    try:
        pile.remove(item)
    except ValueError:
        pass  # somebody else did it too, and was first


def on_late_error(error: BaseException) -> None:
    """What a put-off operation raised. The events module puts itself here."""
    raise error


class Waiter:
    """One blocked thread: it waits, others wake it, as often as they like.

    The lock is used in an unconventional way: locked means "not woken yet". Only the owner acquires it.
    """

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self._lock = Lock()
        self._lock.acquire()

    def wake(self) -> None:
        """Let the owner go on. Never blocks; safe in signal handlers and finalizers."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # somebody else woke it first

    def wait(self, timeout: float | None = None) -> bool:
        """Block until woken or until ``timeout`` seconds have passed; True if woken."""
        if timeout is None:
            return self._lock.acquire()
        return self._lock.acquire(timeout=min(max(timeout, 0.0), MAX_WAIT))


class Room:
    """Something guarded by one lock that is made new in every process.

    Why a re-entrant lock: signal handlers and finalizers run in the middle of locked sections. They
    must be able to see that *this* thread is inside (`is_owned`), and then queue what they want instead of waiting
    for themselves. No section is ever entered twice.

    Why the process id is compared at each entry: a fork copies a lock in whatever state it was, and
    uWSGI forks without running Python's fork hooks.

    How sections are entered: ``with room.enter(): self._x_locked()``, always on one line. An interrupt
    raised between the lines of a program (a tracer, a debugger) then finds no line on which the lock is held outside of
    the ``with``. Functions that need the lock end in ``_locked``.
    """

    __slots__ = ("_locks", "inbox", "lock", "owned", "pid")

    def __init__(self) -> None:
        lock: Any = RLock()
        self.lock = lock
        self.owned: Callable[[], bool] = lock._is_owned  # see `is_owned`; kept, because hot paths ask it
        self.pid = getpid()
        self._locks = {self.pid: self.lock}
        # What operations that found this thread inside want done by the one they interrupted.
        self.inbox: deque[Callable[[], Any]] = deque()

    def enter(self) -> Any:
        """The lock of this process."""
        if self.pid != getpid():
            self._move()
        return self.lock

    def run(self, step: Callable[..., Any], *args: Any) -> bool:
        """Do ``step(*args)`` under the lock; in the middle of a section of this very thread, right after that one.

        A step may return a callable, which is called when the lock is free again. Returns False if it was put off.
        """
        if self.busy_here():
            self.inbox.append(functools.partial(step, *args))
            if not self.busy_here():
                self.settle()  # it was another thread that held the lock, and it may have looked just before
            return False
        with self.enter(): afterwards = step(*args)
        if afterwards is not None:
            afterwards()
        if self.has_leftovers():
            self.settle()
        return True

    def has_leftovers(self) -> bool:
        """Whether somebody was put off or cut off by an interrupt."""
        return bool(self.inbox)

    def settle(self) -> None:
        """Do what was put off."""
        while self.inbox and not self.busy_here():
            try:
                step = self.inbox[0]
            except IndexError:
                return  # another thread was faster
            try:
                with self.enter(): afterwards = step()
                if afterwards is not None:
                    afterwards()
            except Exception as error:  # it belongs to a signal handler that has long returned
                on_late_error(error)
            discard(self.inbox, step)  # only now: an interrupt above leaves it for whoever comes next

    def busy_here(self) -> bool:
        """Whether this very thread is in the middle of a locked section of this room."""
        return self.pid == getpid() and self.owned()

    def _move(self) -> None:
        # setdefault is atomic, so all threads of the new process agree on one fresh lock.
        pid = getpid()
        lock = self._locks.setdefault(pid, RLock())
        with lock: self._move_locked(pid, lock)

    def _move_locked(self, pid: int, lock: Any) -> None:
        if self.pid == pid:
            return
        self.inbox.clear()
        self._after_fork_locked()
        self.owned = lock._is_owned
        self.lock = lock
        self.pid = pid

    def _after_fork_locked(self) -> None:
        """Drop what belongs to the parent process; each kind of room says what that is."""
